# triton-diffusion on NVIDIA's Triton Inference Server.
#
#   docker build -t triton-diffusion .
#   docker run --rm --gpus all --shm-size=1g -p 8000:8000 -p 8001:8001 -p 8002:8002 \
#       -v /models/FLUX.1-dev:/model:ro triton-diffusion --model-path /model --num-gpus 1
#
# --shm-size: the models exchange tensors through /dev/shm, and Docker's default of 64 MB is too little.
# --gpus: the GPUs that may be used; without it everything runs on the CPU.
# Without arguments the built-in demo checkpoint is served. Flags are those of `triton-diffusion serve --help`.

ARG TRITON_VERSION=26.07
FROM nvcr.io/nvidia/tritonserver:${TRITON_VERSION}-py3

# The constraints pin every version; torch comes with its own CUDA libraries.
WORKDIR /opt/triton-diffusion
COPY scripts/constraints.txt ./constraints.txt
RUN torch="$(sed -n 's/^torch==//p' constraints.txt)" \
    && python3 -m pip install --no-cache-dir --break-system-packages --constraint constraints.txt "torch===${torch}"

COPY pyproject.toml README.md ./
COPY model_repository ./model_repository
COPY python_backend ./python_backend
COPY client ./client
RUN python3 -m pip install --no-cache-dir --break-system-packages --constraint constraints.txt --ignore-installed ".[server]"

# Nothing is written outside /tmp, the checkpoint cache and /dev/shm, so any user will do:
# docker run --user 1000:1000 ... works too.
RUN useradd --create-home --uid 10001 triton-diffusion && mkdir -p /cache && chmod 1777 /cache
USER triton-diffusion
WORKDIR /home/triton-diffusion
# Mount a volume here to keep what is fetched from the Hugging Face Hub, and what a start measures of the device.
ENV HF_HOME=/cache/huggingface
ENV TRITON_DIFFUSION_CACHE=/cache/triton-diffusion

EXPOSE 8000 8001 8002
# The ports open when the models are loaded; a large checkpoint takes minutes.
HEALTHCHECK --start-period=30m --interval=30s --timeout=10s --retries=3 \
    CMD ["python3", "-c", "import sys, urllib.request; sys.exit(urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=5).status != 200)"]

# `docker stop` sends SIGTERM: requests that are in their last stage are finished, the others are told to try elsewhere.
ENTRYPOINT ["triton-diffusion", "serve", "--host", "0.0.0.0"]
