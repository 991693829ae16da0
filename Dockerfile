# The image of a cluster: head, workers and jobs run the same one.
#   docker build -t ips .                                                            CPU
#   docker build -t ips --build-arg RAY_IMAGE=rayproject/ray:2.60.0-py311-cu128 .    GPU
# RAY_IMAGE must hold Ray 2.60 on Python 3.11; `rayVersion` of a RayCluster must equal it.
ARG RAY_IMAGE=rayproject/ray:2.60.0-py311-cpu
FROM ${RAY_IMAGE}

USER 0
WORKDIR /opt/ips
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY ips ips
COPY pipeline pipeline
COPY conf conf
# The lock holds every version but those of torch's own CUDA packages, which torch pins itself.
RUN pip install --no-cache-dir --constraint requirements.lock --editable ".[server]" \
    && chown -R 1000 /opt/ips

# ray; by its number, which Kubernetes can tell from root's
USER 1000
ARG IPS_IMAGE=unknown
# IPS_IMAGE stands in the lineage of every run; Ray must not propagate a driver's `uv run`.
ENV IPS_IMAGE=${IPS_IMAGE} \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 \
    RAY_JOB_STOP_WAIT_TIME_S=60
# A broken image fails here and not at night.
RUN python -c "import ray; assert ray.__version__.startswith('2.60.'), ray.__version__" \
    && python -m pipeline doctor storage.root=/tmp/ips-doctor

WORKDIR /home/ray
CMD ["ips", "--help"]
