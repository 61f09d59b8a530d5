# Image of the worker, the servers and the one-step services, for the targets that run on CPUs.
# From the repository's root: docker build --file deployments/docker/cpu.Dockerfile --target production .
FROM python:3.11-slim-bookworm AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    COMPILEFLOW_ENV=prod \
    COMPILEFLOW_HOME=/var/lib/compileflow \
    COMPILEFLOW_OUTPUTS=/outputs
# g++ is there for the target aot-inductor, which compiles on the worker.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 compileflow \
    && install --directory --owner=compileflow /var/lib/compileflow /outputs
WORKDIR /app

FROM base AS build
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt README.md ./
COPY src src
# For an image without CUDA, give the CPU index of PyTorch as --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL=
RUN python -m pip install --constraint constraints.txt \
    '.[compile,generation,int8,mlflow,neptune,onnx-runtime,openvino,prefect-aws,project-tests,signing,validation]'

# The tests, and everything that they need.
FROM build AS development
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && python -m pip install --constraint constraints.txt --editable '.[dev]'
ENV COMPILEFLOW_ENV=dev
COPY . .
RUN chown compileflow /app
USER 10001
CMD ["python", "-m", "pytest", "-m", "not slow"]

FROM base AS production
COPY --from=build /opt/venv /opt/venv
COPY flows flows
COPY tasks tasks
COPY deployments deployments
USER 10001
CMD ["python", "-m", "flows", "--help"]
