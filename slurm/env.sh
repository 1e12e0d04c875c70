# shellcheck shell=bash
# What is particular to your site, in one file: every script here reads it (`source`), on the node where it runs.
# Edit it once. A copy elsewhere works too: sbatch --export=ALL,GESTURE_ENV=/path/to/env.sh …

# Modules that your site wants loaded, such as:
#   module load python/3.11 cuda/12.6

# The environment that `make install` made, in the folder that the job was submitted from. Without one, python is the one that modules and profile give.
VENV=${VENV:-$GESTURE_PROJECT/.venv}

# Where checkpoints from the hub lie. Compute nodes often see no network: on a login node, run once
#   python -m models fetch videomae
# and leave HF_HUB_OFFLINE at 1, so that nobody waits for a network that is not there.
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# A proxy for nodes that have one:
#   export http_proxy=http://proxy:80 https_proxy=http://proxy:80

# A folder on the node's own disk; training copies its shards there while it begins. Empty: shards are read where they lie.
# Many sites make one for each job: STAGE_DIR=${STAGE_DIR:-$TMPDIR}
STAGE_DIR=${STAGE_DIR:-}

# NCCL's network interface, where it guesses wrong:
#   export NCCL_SOCKET_IFNAME=ib0

# One thread for numpy's own libraries: the loader's threads and torch's are set by the programs.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ -f "$VENV/bin/activate" ]; then
	# shellcheck disable=SC1091  # it lies in the environment
	source "$VENV/bin/activate"
fi
