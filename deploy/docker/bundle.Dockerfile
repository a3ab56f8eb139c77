# A model's image: the bundle, and a `cp` to copy it with. The bundle's folder is the build context:
#
#   docker build -f deploy/docker/bundle.Dockerfile --build-arg BASE_DIGEST=sha256:... \
#     -t beamline-bundle:fr-en-int8 path/to/bundle
#
# An image rather than a download at start: it is versioned, pinned by digest, cached on the node and scanned like any
# other, and a pod starts without network access.

# Any small image with a `cp`, by digest alone:
#
#   docker buildx imagetools inspect --format '{{.Manifest.Digest}}' busybox:1.37
ARG BASE_IMAGE=busybox:1.37
ARG BASE_DIGEST=name-it-with--build-arg-BASE_DIGEST
FROM ${BASE_IMAGE}@${BASE_DIGEST}
ARG BASE_IMAGE
ARG BASE_DIGEST
LABEL org.opencontainers.image.title="beamline-bundle" \
      org.opencontainers.image.description="A Beamline model bundle, in /bundle" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}"
# Owned by the user who reads it, whatever the permissions of the folder it was built from.
COPY --chown=65532:65532 . /bundle
USER 65532:65532
