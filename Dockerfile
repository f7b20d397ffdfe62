# The server with its default model inside.
#
#   docker build -t llama-embeddings .
#   docker run -d -p 8089:8089 -v llama_data:/data -v llama_models:/models llama-embeddings
#
# Only what every Docker since 20.10 knows is used, so that the builders of distributions do, too.

# Python 3.11 is the version the requirements are pinned and tested with.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# Builds what has no wheel (llama.cpp) and the model. Nothing of the compiler reaches the final image.
FROM ${BASE_IMAGE} AS builder

# No versions of system packages: the distribution removes old ones, so a pinned build would fail after each of its
# updates. cmake and ninja are brought by pip for as long as it builds.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build

# An image is built on one machine and runs on others, so llama.cpp may not be built for the processor at hand. The
# processor's part is built once for each kind (x86-64 from SSE to AVX-512 and AMX, or the generations of ARM), and the
# best one that the running machine has is chosen at each start. That takes longer to build: some 14 minutes on two busy
# cores instead of 5. For an image that runs only where it is built, `--build-arg LLAMA_CMAKE_ARGS=-DGGML_NATIVE=ON` is
# as fast to run and faster to build.
ARG LLAMA_CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DGGML_BACKEND_DIR=/opt/ggml"
COPY requirements.txt ./
# LLAVA_BUILD is for images as input, which nothing here uses. The directory stays empty in a native build.
RUN mkdir /opt/ggml \
    && CMAKE_ARGS="${LLAMA_CMAKE_ARGS} -DLLAVA_BUILD=OFF" pip install --no-cache-dir --require-hashes --requirement requirements.txt

# Only what makes the model, so that other changes of the code do not fetch it again.
COPY llama_embeddings/__init__.py llama_embeddings/errors.py llama_embeddings/
COPY llama_embeddings/catalogue llama_embeddings/catalogue
RUN python -c 'from pathlib import Path; from llama_embeddings.catalogue.default_model import get_default_model; get_default_model(Path("/models"), progress=print)' \
    && rm -f /models/.*.lock


FROM ${BASE_IMAGE}

# For scans, with USE_OCR=True: `--build-arg OCR_PACKAGES="tesseract-ocr tesseract-ocr-deu"` (English comes with the first).
ARG OCR_PACKAGES=""
# The packages are a list, so they stand without quotes.
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 ${OCR_PACKAGES} \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 --user-group --shell /usr/sbin/nologin server \
    && install --directory --owner=server --group=server --mode=0700 /data

COPY --from=builder /opt/ggml /opt/ggml
COPY --from=builder /opt/venv /opt/venv
# A new volume for /models starts with this content: the default model needs no network.
COPY --from=builder --chown=server:server /models /models

WORKDIR /app
COPY LICENSE llama_embeddings_server.py embeddings_data_models.py ramdisk_functions.py similarity_measures.py ./
COPY llama_embeddings llama_embeddings
# The measures' machine code fits the kind of processor it is made on. A container on another kind makes its own at its
# first start and keeps it in /data; a new volume for /data starts with what is made here.
RUN /opt/venv/bin/python -m compileall -q . \
    && NUMBA_CACHE_DIR=/data/numba_cache /opt/venv/bin/python -c 'import similarity_measures; similarity_measures.warm_up()' \
    && chown -R server:server /data/numba_cache

# Whoever can reach the port needs the token: SECURITY_TOKEN, or the one made at the first start and kept in /data.
# Numba's compiled functions are kept there as well, as /app is not the server's to write.
# hadolint is told that this sets whether there is a token and where, not the token.
# hadolint ignore=DL3064
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LISTEN_HOST=0.0.0.0 \
    LLAMA_EMBEDDING_SERVER_LISTEN_PORT=8089 \
    USE_SECURITY_TOKEN=True \
    SECURITY_TOKEN_PATH=/data/security_token \
    DATABASE_URL=sqlite+aiosqlite:////data/embeddings.sqlite \
    LOG_DIRECTORY=/data/logs \
    NUMBA_CACHE_DIR=/data/numba_cache \
    MODELS_DIRECTORY=/models

# The user `server`, as a number so that orchestrators can see that it is not root.
USER 10001:10001
VOLUME ["/data", "/models"]
EXPOSE 8089

HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=6 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['LLAMA_EMBEDDING_SERVER_LISTEN_PORT'] + '/health', timeout=4)"]

# No init process is needed: the server handles SIGTERM itself (it answers what is under way, at most some ten seconds)
# and waits for the one child process it makes.
CMD ["python", "llama_embeddings_server.py"]
