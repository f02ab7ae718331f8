# A Google Cloud Storage emulator for tests: one static binary, built from its Go module by tests/support/gcs.py.
FROM scratch
COPY fake-gcs-server /fake-gcs-server
USER 65532:65532
ENTRYPOINT ["/fake-gcs-server"]
