# syntax=docker/dockerfile:1
# The serving image: no torch, no compiler, not root.   make image            (CPU)
#                                                       make image VARIANT=cuda
# For HTTP and JSON: -p 8080:8080, and serve … --http-host 0.0.0.0 --http-port 8080.
#   docker run -p 50051:50051 -p 9464:9464 -v $PWD/collections:/collections likewise:cpu
# With a bundle of yours: -v $PWD/bundle:/bundle:ro … likewise:cpu serve --host 0.0.0.0 --bundle /bundle --collections /collections
ARG VARIANT=cpu

FROM python:3.12-slim AS build
ARG VARIANT
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE likewise.py ./
COPY export ./export
COPY service ./service
COPY training ./training
# [gpu] brings onnxruntime-gpu[cuda,cudnn]: without torch, nothing else brings the CUDA libraries.
RUN python -m venv /opt/likewise \
    && extra="$(if [ "${VARIANT}" = cuda ]; then echo gpu; else echo cpu; fi)" \
    && /opt/likewise/bin/pip install --no-cache-dir ".[${extra},serve,http]"

FROM python:3.12-slim
LABEL org.opencontainers.image.title="Likewise" \
      org.opencontainers.image.description="Image embeddings and similarity search over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0 AND MIT AND LicenseRef-ImageNet-terms"
COPY --from=build /opt/likewise /opt/likewise
ENV PATH=/opt/likewise/bin:$PATH PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/tmp
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin likewise \
    && install -d -o likewise /collections
USER 10001
VOLUME /collections
EXPOSE 50051 9464
# Readiness, through our own client: the canary picture and query came back right.
HEALTHCHECK --interval=15s --timeout=6s --start-period=60s CMD ["likewise", "healthcheck"]
ENTRYPOINT ["likewise"]
CMD ["serve", "--host", "0.0.0.0", "--collections", "/collections"]
