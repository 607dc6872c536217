# An image whose user owns /data: a new volume takes that over from it, so that no container has to start as root.
ARG IMAGE
FROM busybox:1.37.0 AS data
RUN mkdir /data && chown 10001:10001 /data

FROM ${IMAGE}
COPY --from=data --chown=10001:10001 /data /data
USER 10001:10001
