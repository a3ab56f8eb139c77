# The server's image, for CPUs and for NVIDIA GPUs (BASE_DIGEST is told below):
#
#   docker build -f deploy/docker/server.Dockerfile --build-arg BASE_DIGEST=sha256:... -t beamline-server:0.1.0-cpu .
#
# and the same with --build-arg VARIANT=gpu. Both variants stand on the same base. The GPU variant brings CUDA and cuDNN
# as wheels, in the versions that its onnxruntime was built for; the driver comes from the node. A CUDA base image would
# carry a second copy of both.

# Any image with Python 3.11-3.13 as `python3`, and pip. By digest alone, so that what was tested is what is built:
#
#   docker buildx imagetools inspect --format '{{.Manifest.Digest}}' python:3.11-slim-bookworm
ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG BASE_DIGEST=name-it-with--build-arg-BASE_DIGEST
# cpu or gpu.
ARG VARIANT=cpu


# ---- everything as wheels -------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE}@${BASE_DIGEST} AS wheels
ARG VARIANT
WORKDIR /src
# Whatever is downloaded is named in these files with its version and the hashes that it may have; `make locks` writes
# them. --only-binary: no dependency is compiled, so no stage needs a compiler. The download cache belongs to the
# builder and enters no layer.
COPY deploy/docker/requirements-*.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip download --require-hashes --only-binary :all: --requirement "requirements-${VARIANT}.txt" \
       --dest /wheels \
    && python3 -m venv /build-tools \
    && /build-tools/bin/pip install --require-hashes --only-binary :all: --requirement requirements-build.txt
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY server server
COPY export export
COPY client client
COPY models/fr-en/test.tsv.gz models/fr-en/LICENSE models/fr-en/
# --no-build-isolation: with the build tools above, instead of whichever pip would fetch.
RUN /build-tools/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels .


# ---- the wheels, installed ------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE}@${BASE_DIGEST} AS installed
ARG VARIANT
COPY deploy/docker/requirements-${VARIANT}.txt /requirements.txt
COPY --from=wheels /wheels /wheels
# --no-index: what the wheels stage fetched is all there is, and its hashes are compared once more. The environment has
# no pip of its own: it is copied as it stands, and nothing is ever installed into a running server.
RUN python3 -m venv --without-pip /opt/beamline \
    && python3 -m pip --python /opt/beamline/bin/python3 install --no-cache-dir --no-index --find-links /wheels \
       --require-hashes --requirement /requirements.txt \
    && python3 -m pip --python /opt/beamline/bin/python3 install --no-cache-dir --no-index --no-deps \
       /wheels/beamline_serving-*.whl \
    && python3 -m pip --python /opt/beamline/bin/python3 check
# Machine code for the engine's loops, beside their source: no compiler runs when a server starts. For processors like
# the one that builds, and for any of the architecture.
RUN /opt/beamline/bin/beamline compile \
    && NUMBA_CPU_NAME=generic /opt/beamline/bin/beamline compile
# onnxruntime's CUDA provider looks for its libraries where the linker looks, and wheels put them elsewhere. One folder
# of links, for LD_LIBRARY_PATH; it stays empty in the CPU variant.
RUN mkdir /opt/beamline/cuda \
    && find /opt/beamline -path '*/nvidia/*/lib/*.so*' -exec ln -s {} /opt/beamline/cuda/ \;


# ---- what runs ------------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE}@${BASE_DIGEST} AS runtime
ARG BASE_IMAGE
ARG BASE_DIGEST
ARG VARIANT
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="beamline-server" \
      org.opencontainers.image.description="Beam search with encoder-decoder Transformers over gRPC (${VARIANT})" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}"

# No program of the base keeps a set-user-id bit: nothing here has a reason to become root.
RUN find / -xdev -type f -perm /6000 -exec chmod a-s {} +

COPY --from=installed /opt/beamline /opt/beamline

# HOME: the user has no entry in /etc/passwd, and /tmp is the one place that a read-only container can write to.
# NVIDIA_DRIVER_CAPABILITIES: what the container toolkit mounts of the driver; without a GPU it means nothing. Which
# GPUs are visible is for the device plugin to say, so NVIDIA_VISIBLE_DEVICES must not be set in an image.
# ORT_DISABLE_TELEMETRY: for whatever else is run in this image; the server sets it by itself.
# GLIBC_TUNABLES: weights in huge pages where the node allows them, 2 % faster on a CPU (docs/performance.md).
ENV PATH=/opt/beamline/bin:${PATH} \
    LD_LIBRARY_PATH=/opt/beamline/cuda \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
    ORT_DISABLE_TELEMETRY=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

USER 65532:65532

# Checks, as the user who will run it. Nothing of the export side has slipped in: PyTorch alone would be larger than all
# the rest, and a server must never unpickle anything.
RUN python3 -c "import importlib.util as u; extra = [m for m in ('torch', 'transformers', 'onnx') if u.find_spec(m)]; \
assert not extra, f'not for a server: {extra}'"
# The CUDA provider finds everything but the driver, which the node brings.
RUN if [ "${VARIANT}" = gpu ]; then \
      ldd /opt/beamline/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so > /tmp/linked \
      && awk '/not found/ && $1 != "libcuda.so.1" { print; missing = 1 } END { exit missing }' /tmp/linked >&2 \
      && rm /tmp/linked; \
    fi
# The engine's loops have their machine code, and the command starts.
RUN beamline compile --check \
    && beamline serve --help > /dev/null

EXPOSE 8001 8002
STOPSIGNAL SIGTERM
# Exec form: the server is process 1 and gets SIGTERM itself.
ENTRYPOINT ["beamline", "serve"]
CMD ["/models/bundle"]
