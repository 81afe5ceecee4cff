#!/usr/bin/env bash
# The points of the README's picture of distillation epochs (the shape of the paper's Fig. 3): a fresh
# student for each capacity and number of epochs, from the shipped Pong buffer.
#
#     bash benchmark/epochs.sh medium "1 2 5 10 20"
#     bash benchmark/epochs.sh low "1 2 5 10 20"
set -euo pipefail
game=PongNoFrameskip-v4
results=benchmark/results/$game
mkdir -p "$results"
for epochs in $2; do
    name=distill_$1_$epochs
    [ -e "$results/$name" ] && continue
    python actor_distill.py --env-id $game --buffer-path pretrained/$game/buffer.npz --capacity "$1" \
        --epochs "$epochs" --batch-size 64 --loss kl --optimizer sgd --learning-rate 0.03 --no-anneal-lr \
        --eval-steps 50_000 --exp-name "$name" --overwrite --save-path "checkpoints/$game/$name.pt"
    cp -r "$(ls -d runs/${game}__"${name}"__* | tail -n 1)" "$results/$name"
done
