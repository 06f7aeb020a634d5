# `srdeploy serve` in a container, on the CPU:
#
#   docker build -t srdeploy-serve .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/deploy:/models:ro" \
#       -v "$PWD/api-key.txt:/run/secrets/srdeploy_api_key:ro" srdeploy-serve night=/models/night
#
# The key is read from a file: as an environment variable it would stand in `docker inspect`.

ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS build
RUN python -m venv /opt/srdeploy
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY srdeploy srdeploy
COPY train train
COPY export export
COPY serve serve
# No torch: the server runs ONNX files.
RUN /opt/srdeploy/bin/pip install --no-cache-dir --constraint constraints.txt ".[cpu,serve]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/srdeploy /opt/srdeploy
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin srdeploy
USER 10001:10001
# The root may be mounted read-only: all that is written goes to /tmp.
ENV PATH=/opt/srdeploy/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
WORKDIR /models
EXPOSE 8000
STOPSIGNAL SIGTERM
# Ready means loaded and warmed up; the layout of sessions is measured before.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as request; request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
ENTRYPOINT ["srdeploy", "serve", "--host", "0.0.0.0", "--port", "8000", "--log", "json", "--api-key-file", "/run/secrets/srdeploy_api_key"]
