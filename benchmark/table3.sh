#!/usr/bin/env bash
# One row of the paper's Table 3, and what belongs to it: the runs, by plain commands. Then
# `python benchmark/table3.py` makes the table from what they wrote to benchmark/results/{game}/table3/.
#
#     bash benchmark/table3.sh PongNoFrameskip-v4 2371584 "1 2 3"
#     bash benchmark/table3.sh PongNoFrameskip-v4 2371584 "1 2 3" "direct_.*"   # only the runs so named
#
# Arguments: the game, the teacher's steps, the seeds, and a pattern of names. What is there already is not
# run again, and a training that was stopped goes on. The teacher and its buffer are those of the
# scripts' default paths, or the shipped ones.
set -euo pipefail
game=$1 budget=$2 seeds=$3 only=${4:-.*}
results=benchmark/results/$game/table3 checkpoints=checkpoints/$game
teacher=$checkpoints/ppo_high.pt buffer=buffers/$game.npz
[ -e "$teacher" ] || teacher=pretrained/$game/ppo_high.pt
[ -e "$buffer" ] || buffer=pretrained/$game/buffer.npz
# smaller rollouts and fewer passes than the paper's, as the shipped teacher was trained
ppo="--num-steps 128 --num-minibatches 8 --checkpoint-interval 50_000 --resume"
direct="$ppo --update-epochs 4 --learning-rate 5e-4 --clip-coef 0.2 --total-timesteps $budget"
tuned="$ppo --update-epochs 3 --learning-rate 2.5e-4 --clip-coef 0.1 --total-timesteps $((budget * 27 / 100))"

run() {  # name, script and flags
    local name=$1 start=$SECONDS
    shift
    [[ $name =~ ^($only)$ && ! -e $results/$name/run.json ]] || return 0
    set -- "$@" --env-id "$game" --exp-name "$name" --eval-steps 200_000
    echo "== $name: python $*"
    python "$@"
    mkdir -p "$results/$name"
    cp "$(ls -d runs/"${game}__${name}__"* | tail -n 1)"/* "$results/$name/"
    echo "{\"command\": \"python $*\", \"seconds\": $((SECONDS - start))}" > "$results/$name/run.json"
}

distil() {  # name, seed, capacity, epochs, further flags
    local name=$1 seed=$2 capacity=$3 epochs=$4
    shift 4
    run "$name" actor_distill.py --buffer-path "$buffer" --capacity "$capacity" --epochs "$epochs" \
        --seed "$seed" --save-path "$checkpoints/$name.pt" --resume "$@"
}

finetune() {  # name, seed, the student's name and capacity, further flags
    local name=$1 seed=$2 student=$3 capacity=$4
    shift 4
    [[ $name =~ ^($only)$ && ! -e $results/$name/run.json ]] || return 0
    # a student whose evaluation is at hand but whose weights are not is the same when made again
    [ -e "$checkpoints/$student.pt" ] || python actor_distill.py --env-id "$game" --seed "$seed" \
        --buffer-path "$buffer" --capacity "$capacity" --epochs 10 --eval-steps 0 \
        --save-path "$checkpoints/$student.pt" $([[ $student =~ value ]] && echo --value-coef 0.5)
    run "$name" finetune_student.py --student-path "$checkpoints/$student.pt" --seed "$seed" \
        --save-path "$checkpoints/$name.pt" $tuned "$@"
}

run teacher ppo_atari_teacher.py --eval-only "$teacher"
for capacity in medium low; do
    for seed in $seeds; do
        distil "ad10_${capacity}_$seed" "$seed" $capacity 10
        finetune "tuned_${capacity}_$seed" "$seed" "ad10_${capacity}_$seed" $capacity
    done
    seed=${seeds%% *}
    distil "ad50_${capacity}_$seed" "$seed" $capacity 50
    distil "ad100_${capacity}_$seed" "$seed" $capacity 100
done
# does the untrained critic hurt?
distil "value10_medium_$seed" "$seed" medium 10 --value-coef 0.5
finetune "tuned_value_medium_$seed" "$seed" "value10_medium_$seed" medium
finetune "tuned_warmup_medium_$seed" "$seed" "ad10_medium_$seed" medium --critic-warmup-updates 10
for capacity in medium low; do
    run "direct_${capacity}_$seed" ppo_atari_teacher.py --capacity $capacity --seed "$seed" \
        --save-path "$checkpoints/direct_${capacity}_$seed.pt" $direct
done
