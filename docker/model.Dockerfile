# An artifact as an image that a Kubernetes image volume mounts: `make model-image MODEL=PATH TAG=NAME:TAG`.
# hadolint ignore=DL3006
FROM scratch
COPY . /
LABEL org.opencontainers.image.title="vit-refinery model" \
      org.opencontainers.image.description="A refined backbone: weights, manifest, model card"
