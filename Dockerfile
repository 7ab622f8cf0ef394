# deepsplit's images: `cpu` (head, gateways, CPU attention and experts, the demo model) and `gpu` (the same on CUDA).
# How to build, check and push them: docs/kubernetes.md.
#
# For a build that is the same tomorrow give the bases by digest: --build-arg CPU_BASE=rayproject/ray@sha256:…
ARG CPU_BASE=rayproject/ray:2.60.0-py311-cpu
ARG GPU_BASE=rayproject/ray:2.60.0-py311-gpu


FROM ${CPU_BASE} AS cpu-base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY --chown=ray:users lock/torch-cpu.txt lock/cpu.txt /tmp/lock/
RUN pip install --no-cache-dir --no-deps -r /tmp/lock/torch-cpu.txt \
    && pip install --no-cache-dir --no-deps -r /tmp/lock/cpu.txt


FROM ${GPU_BASE} AS gpu-base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY --chown=ray:users lock/gpu.txt /tmp/lock/
RUN pip install --no-cache-dir --no-deps -r /tmp/lock/gpu.txt


FROM cpu-base AS cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="deepsplit" \
      org.opencontainers.image.description="MoE models with attention and experts on different nodes, for CPUs" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="rayproject/ray:2.60.0-py311-cpu"
WORKDIR /opt/deepsplit
COPY models/demo models/demo
COPY pyproject.toml README.md LICENSE ./
COPY cluster cluster
COPY routing routing
COPY deployments deployments
COPY monitoring monitoring
USER 0
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && chmod -R a+rX /opt/deepsplit
# By number: Kubernetes can only check that a number is not root.
USER 1000:1000


FROM gpu-base AS gpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="deepsplit" \
      org.opencontainers.image.description="MoE models with attention and experts on different nodes, for GPUs" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="rayproject/ray:2.60.0-py311-gpu"
WORKDIR /opt/deepsplit
COPY pyproject.toml README.md LICENSE ./
COPY cluster cluster
COPY routing routing
COPY deployments deployments
COPY monitoring monitoring
USER 0
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && chmod -R a+rX /opt/deepsplit
USER 1000:1000
