#!/usr/bin/env bash
# What a machine with an NVIDIA GPU measures, the most important first: benchmarks/gpu.sh [SECONDS] [FOLDER] [short]
# SECONDS are those of all together (350 unless given; imports and builds add a minute); `short`: training alone.
# Nothing is lost when it is ended early: each table is written at once.
set -uo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-350} folder=${2:-benchmarks/results}
run() { # share of the time in hundredths, then the arguments
    local share=$1
    shift
    ${PYTHON:-python3} -m benchmarks "$@" --seconds $((seconds * share / 100)) --out "$folder"
}

if [ "${3:-}" = short ]; then
    run 55 peak training --workloads 'cifar10-128' --profile 'published fp16,bf16 channels_last,bf16 channels_last compile' \
        --ways 'bf16,bf16 channels_last,fp16 channels_last,*mixed,tf32,diffusers*,bf16 channels_last compile'
    run 5 norms
    run 15 training --workloads 'cifar10-16' --ways 'bf16,bf16 channels_last,bf16 cuda_graphs,*channels_last cuda_graphs,diffusers*'
    run 25 training --workloads 'imagenet64-*' --ways 'bf16,bf16 channels_last,diffusers*' --profile 'bf16 channels_last'
    exit
fi
run 35 peak training --workloads 'cifar10-128' --profile 'published fp16,bf16 channels_last*'
run 30 training --workloads 'imagenet64-*' --profile 'published fp16,bf16 channels_last,bf16 channels_last compile' \
    --ways 'bf16,bf16 channels_last,fp16 channels_last,fp32,diffusers*,bf16 channels_last compile'
run 15 training --workloads 'cifar10-16' --profile 'bf16 channels_last,bf16 channels_last compile cuda_graphs' \
    --ways 'bf16,bf16 channels_last,fp16,fp32,bf16 cuda_graphs,diffusers*,bf16 channels_last compile cuda_graphs'
run 10 sampling network --workloads 'cifar10-128'
run 10 norms metrics averages bound
