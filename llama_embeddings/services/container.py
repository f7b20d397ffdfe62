"""All services of a running server, as one value that handlers get theirs from."""

from __future__ import annotations

from dataclasses import dataclass

from embeddings_data_models import Truncation
from llama_embeddings.services.advanced_search import AdvancedSearchService
from llama_embeddings.services.contents import ContentsService
from llama_embeddings.services.documents import DocumentService
from llama_embeddings.services.downloads import DocumentDownloads
from llama_embeddings.services.embeddings import EmbeddingService
from llama_embeddings.services.jobs import JobService
from llama_embeddings.services.late_interaction import LateInteractionService
from llama_embeddings.services.models import ModelService
from llama_embeddings.services.readiness import ReadinessService
from llama_embeddings.services.removals import DocumentRemovals
from llama_embeddings.services.rerank import RerankService
from llama_embeddings.services.search import SearchService
from llama_embeddings.services.similarity import SimilarityService
from llama_embeddings.services.statistics import StatisticsService
from llama_embeddings.services.texts import TextLimits
from llama_embeddings.services.token_embeddings import TokenEmbeddingService
from llama_embeddings.services.tokenization import TokenizationService


@dataclass(frozen=True, slots=True)
class Services:
    """Made once at the start, by `llama_embeddings_server`."""

    models: ModelService
    contents: ContentsService
    embeddings: EmbeddingService
    token_embeddings: TokenEmbeddingService
    documents: DocumentService
    document_downloads: DocumentDownloads
    jobs: JobService
    removals: DocumentRemovals
    search: SearchService
    advanced_search: AdvancedSearchService
    late_interaction: LateInteractionService
    similarity: SimilarityService
    rerank: RerankService
    tokenization: TokenizationService
    limits: TextLimits
    default_truncation: Truncation
    max_texts_in_flight: int
    readiness: ReadinessService
    statistics: StatisticsService
