"""HTTP: one module per dialect. Parses, makes one call to a service, renders; decides nothing."""
