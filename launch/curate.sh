#!/usr/bin/env bash
# Curation on a cluster: launch/curate.sh flink|spark|dataflow WORKDIR INPUT [more options of curation.main]
# CONFIG is configs/curate.py:preset=florence, which needs --config.scores.relevance=checkpoint:WORKDIR_OF_PRETRAINING.
# Workers need florence_jax[curation] and access to WORKDIR; for Flink and Spark through a Beam worker pool or image.
set -euo pipefail
[[ $# -ge 3 ]] || { sed -n 2,4p "$0" >&2; exit 2; }
kind=$1 workdir=$2 input=$3
shift 3
case $kind in
  flink)
    runner=FlinkRunner
    beam="--flink_master=${FLINK_MASTER:?host:port of the job manager} --environment_type=EXTERNAL \
--environment_config=${BEAM_WORKER_POOL:-localhost:50000} --parallelism=${PARALLELISM:-64}"
    ;;
  spark)
    runner=SparkRunner
    beam="--spark_master_url=${SPARK_MASTER:?spark://host:port} --environment_type=EXTERNAL \
--environment_config=${BEAM_WORKER_POOL:-localhost:50000}"
    ;;
  dataflow)
    runner=DataflowRunner
    beam="--project=${PROJECT:?} --region=${REGION:?} --temp_location=$workdir/tmp --sdk_container_image=${IMAGE:?} \
--sdk_location=container --experiments=use_runner_v2 --max_num_workers=${MAX_WORKERS:-500}"
    ;;
  *)
    echo "error: unknown runner $kind; choose flink, spark or dataflow" >&2
    exit 2
    ;;
esac
exec python -m florence_jax.curation.main --config="${CONFIG:-configs/curate.py:preset=florence}" \
  --workdir="$workdir" --input="$input" --runner="$runner" --beam="$beam" "$@"
