# docker build -t lora-grpo .                            CPU, with the versions of cpu.lock
# docker build -t lora-grpo --build-arg FLAVOUR=gpu .    CUDA, with the newest versions that pyproject.toml allows
# docker run --rm --shm-size=8g [--gpus all] -v "$PWD:/runs" lora-grpo train run.toml
# Versions live in /dev/shm, of which Docker gives 64 MiB unless --shm-size says more.
FROM python:3.11-slim
ARG FLAVOUR=cpu
# A compiler: our CPU kernels, and Triton's on a GPU, are built at first use.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ make libnuma1 \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/lora-grpo
COPY . .
RUN make setup FLAVOUR=${FLAVOUR}
ENV PATH=/opt/lora-grpo/.venv/bin:${PATH}
WORKDIR /runs
ENTRYPOINT ["lora-grpo"]
