# SPDX-License-Identifier: Apache-2.0
# Sourced on a GPU machine that no package registry reaches: install the carried wheels and point at torch's cuDNN.
#   WHEELS=folder . benchmarks/gpu_setup.sh
SITE="${SITE:-/tmp/site}"
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$WHEELS"/*.whl
export PYTHONPATH="$SITE:$PWD" PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1
# Two cuDNN versions in one process fail with "sublibrary loading failed": both loaders must find torch's own.
CUDNN_HOME="$(python3 -c 'import nvidia.cudnn; print(list(nvidia.cudnn.__path__)[0])')"
export CUDNN_HOME CUDNN_PATH="$CUDNN_HOME" LD_LIBRARY_PATH="$CUDNN_HOME/lib:$LD_LIBRARY_PATH"
