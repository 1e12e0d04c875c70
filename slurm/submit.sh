#!/bin/bash
# Submits a run that is longer than the time limit as so many jobs, each of which goes on where the one before it stopped:
#
#   slurm/submit.sh 3 --array=1-20 --gres=gpu:a100:1 slurm/train.sbatch --sweep sweep.txt --dataset-home SHARDS --logger-folder runs/sweep …
#
# slurm/submit.sh LINKS [what sbatch takes …]. In an array, element I of a link waits for element I of the link before (aftercorr); an element that
# failed or was cancelled takes its later links with it: look at its output, then submit again, which continues every run that is not done.
set -euo pipefail
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
	echo "usage: slurm/submit.sh LINKS [sbatch's options] slurm/train.sbatch [train.py's flags]; found: $*" >&2
	exit 2
fi
links=$1
shift
kind=afterok
for word in "$@"; do
	case $word in -a | --array | --array=* | -a[0-9]*) kind=aftercorr ;; *.sbatch) break ;; esac
done
before=
for link in $(seq "$links"); do
	job=$(sbatch --parsable ${before:+--dependency="$kind:$before" --kill-on-invalid-dep=yes} "$@")
	job=${job%%;*}
	echo "link $link of $links: job $job${before:+, after job $before}"
	before=$job
done
