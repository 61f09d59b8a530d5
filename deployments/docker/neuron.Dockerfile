# Image of the worker on AWS Inf2 and Trn1: AWS's image of Neuron 2.31, the last release that traces with PyTorch/XLA.
# From the repository's root: docker build --file deployments/docker/neuron.Dockerfile --target production .
FROM public.ecr.aws/neuron/pytorch-inference-neuronx:2.9.0-neuronx-py312-sdk2.31.0-ubuntu24.04 AS base
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    COMPILEFLOW_ENV=prod \
    COMPILEFLOW_HOME=/var/lib/compileflow \
    COMPILEFLOW_OUTPUTS=/outputs
RUN useradd --create-home --uid 10001 compileflow \
    && install --directory --owner=compileflow /var/lib/compileflow /outputs
WORKDIR /app
# AWS's image starts a model server.
ENTRYPOINT []

# The packages go into AWS's environment, because torch-neuronx belongs to its torch: pip keeps both as they are.
FROM base AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY pyproject.toml README.md ./
COPY src src
RUN python -m pip freeze --exclude-editable | grep --extended-regexp '^(neuronx-cc|torch|torch-neuronx|torch-xla)==' > neuron.txt \
    && python -m pip install --constraint neuron.txt '.[hf,neptune,prefect-aws,project-tests,signing,validation]'

FROM build AS development
COPY . .
RUN python -m pip install --constraint neuron.txt pytest pytest-xdist \
    && chown compileflow /app
ENV COMPILEFLOW_ENV=dev
USER 10001
CMD ["python", "-m", "pytest", "tests/conformance/test_neuronx.py"]

FROM build AS production
COPY flows flows
COPY tasks tasks
COPY deployments deployments
USER 10001
CMD ["python", "-m", "flows", "--help"]
