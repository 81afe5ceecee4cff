#!/usr/bin/env bash
# What do the paper's "batch sizes of 32" mean? Its rollout, for as many steps as you can wait for, in 32
# minibatches (of 1,024 samples) and in 1,024 minibatches (of 32). The learning rate stays at its start, as
# it nearly does in the first steps of 75M. `python benchmark/figures.py` draws the curves.
#
#     bash benchmark/batches.sh PongNoFrameskip-v4 327680 1
#
# Arguments: the game, the steps, the seed, and the numbers of minibatches if not both. What is there
# already is not run again.
set -euo pipefail
game=$1 steps=$2 seed=$3
for minibatches in ${4:-32 1024}; do
    name=batches_${minibatches}_$seed
    results=benchmark/results/$game/batches/$name
    [ ! -e "$results" ] || continue
    python ppo_atari_teacher.py --env-id "$game" --total-timesteps "$steps" --no-anneal-lr \
        --num-minibatches $minibatches --seed "$seed" --exp-name "$name" --eval-steps 0 --overwrite \
        --save-path "checkpoints/$game/$name.pt" &
    # processor time, which neighbours on the same machine lengthen less than wall time
    samples=$(mktemp)
    while kill -0 $! 2> /dev/null; do
        echo "$(date +%s) $(ps -o cputimes= -p $! || true)" >> "$samples"
        sleep 10
    done
    wait $!
    mkdir -p "$results"
    cp "$(ls -d runs/"${game}__${name}__"* | tail -n 1)"/* "$results/"
    mv "$samples" "$results/processor_seconds.txt"
done
