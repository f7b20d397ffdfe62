"""Tests. With SQLITE_OF_TESTS=newest, they run on the SQLite that `pysqlite3` brings and not on Python's.

Debian 12 has 3.40, and releases differ in what the store depends on. The module is exchanged before anything else can
import it; servers that tests start as programs keep Python's.
"""

import os
import sys

if os.environ.get("SQLITE_OF_TESTS") == "newest":
    import pysqlite3
    import pysqlite3.dbapi2

    sys.modules["sqlite3"] = pysqlite3
    sys.modules["sqlite3.dbapi2"] = pysqlite3.dbapi2
