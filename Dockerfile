# A container for GKE (XPK) and other clusters. Built by scripts/xpk_run.sh, or:
#   docker build --platform linux/amd64 --build-arg EXTRAS=data,cuda -t octo_like .
FROM python:3.11-slim

# tpu or cuda beside data; `wandb`, `hub` and so on where they are wanted.
ARG EXTRAS=data,tpu

RUN pip install --no-cache-dir uv
WORKDIR /octo_like

# The dependencies first: they change less often than the code. setup.py reads the version and the README.
COPY setup.py pyproject.toml README.md LICENSE ./
COPY requirements/cpu.lock requirements/cpu.lock
COPY octo_like/__init__.py octo_like/__init__.py
RUN uv pip install --system --no-cache --compile-bytecode --constraint requirements/cpu.lock --editable ".[$EXTRAS]"

COPY . .
ENV PYTHONUNBUFFERED=1
CMD ["python", "scripts/doctor.py"]
