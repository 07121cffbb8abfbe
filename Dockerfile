# One image for every pod. GPUs (the default): docker build -t springtide:0.1.0 .
# CPUs only: docker build --build-arg VARIANT=cpu -t springtide:0.1.0-cpu .
# Ray's own image brings what KubeRay's probes call (wget), a C compiler for Triton, CUDA in the gpu variant, and the user ray (1000).
ARG VARIANT=gpu
FROM rayproject/ray:2.60.0-py311-${VARIANT}
ARG VARIANT

USER 1000
# .dockerignore lets in only what is installed. COPY makes the folder ray's; WORKDIR alone would make it root's.
COPY --chown=1000:100 . /home/ray/springtide/
WORKDIR /home/ray/springtide

# Editable, so that jobs started here and Serve's workers import the same files. The CPU environment installs from its lock alone:
# resolving would pull in torchvision and torchaudio, which do not fit a CPU torch.
RUN if [ "$VARIANT" = cpu ]; then \
        pip install --no-cache-dir --no-deps --extra-index-url https://download.pytorch.org/whl/cpu -r requirements/cpu.txt \
        && pip install --no-cache-dir --no-deps --editable .; \
    else \
        pip install --no-cache-dir --constraint requirements/gpu.txt --editable ".[gpu]"; \
    fi

ENV RAY_AUTH_MODE=token
