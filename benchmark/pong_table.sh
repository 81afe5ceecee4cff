#!/usr/bin/env bash
# One row of the paper's Table 3, and what belongs to it: the runs, by plain commands. Then
# `python benchmark/pong_table.py` makes the table from what they wrote to benchmark/results/{game}/table3/.
#
#     bash benchmark/pong_table.sh PongNoFrameskip-v4 2371584 "1 2 3"
#     bash benchmark/pong_table.sh PongNoFrameskip-v4 2371584 "1 2 3" "direct_.*"   # only the runs so named
#
# Arguments: the game, the teacher's steps, the seeds, and a pattern of names. What is there already is not
# run again, and a training that was stopped goes on. The teacher and its buffer are those of the
# scripts' default paths, or the shipped ones. A student of 50 epochs is the one of 10, distilled further,
# which equals 50 at once bit for bit on a CPU.
set -euo pipefail
game=$1 budget=$2 seeds=$3 only=${4:-.*}
results=benchmark/results/$game/table3 checkpoints=checkpoints/$game
teacher=$checkpoints/ppo_high.pt buffer=buffers/$game.npz
[ -e "$teacher" ] || teacher=pretrained/$game/ppo_high.pt
[ -e "$buffer" ] || buffer=pretrained/$game/buffer.npz
# the paper's SGD at a constant rate
sgd="--loss kl --optimizer sgd --learning-rate 0.03 --batch-size 32 --no-anneal-lr"
# smaller rollouts and fewer passes than the paper's, as the shipped teacher was trained
ppo="--num-steps 128 --num-minibatches 8 --checkpoint-interval 50_000 --resume"
direct="$ppo --update-epochs 4 --learning-rate 5e-4 --clip-coef 0.2 --total-timesteps $budget"
tuned="$ppo --update-epochs 3 --learning-rate 2.5e-4 --clip-coef 0.1 --total-timesteps $((budget * 27 / 100))"

wanted() {  # name: is it asked for, and not there yet?
    [[ $1 =~ ^($only)$ && ! -e $results/$1/run.json ]]
}

run() {  # name, that of the experiment, what it goes on from if anything, script and flags
    local name=$1 experiment=$2 after=$3 time TIMEFORMAT='"seconds": %R, "user": %U, "system": %S'
    shift 3
    set -- "$@" --env-id "$game" --exp-name "$experiment" --eval-steps 200_000
    echo "== $name: python $*"
    exec 3>&2
    time=$({ time python "$@" 1>&3 2>&3; } 2>&1)
    mkdir -p "$results/$name"
    cp "$(ls -d runs/"${game}__${experiment}__"* | tail -n 1)"/* "$results/$name/"
    echo "{\"command\": \"python $*\", \"after\": \"$after\", $time}" > "$results/$name/run.json"
}

distil() {  # ad or value, capacity, seed, epochs, how many of them another student has had, flags
    local name=${1}${4}_${2}_$3 experiment=${1}_${2}_$3 after=
    local save_path=$checkpoints/$name.pt from=${1}${5}_${2}_$3 capacity=$2 seed=$3 epochs=$4
    wanted "$name" || return 0
    shift 5
    if [ -e "$checkpoints/$from.pt" ]; then
        after=$from
        [ -e "$save_path" ] || cp "$checkpoints/$from.pt" "$save_path"
    fi
    run "$name" "$experiment" "$after" actor_distill.py --buffer-path "$buffer" --capacity "$capacity" \
        --epochs "$epochs" --seed "$seed" --save-path "$save_path" --resume $sgd "$@"
}

finetune() {  # name, capacity, seed, the student's name, further flags
    local name=$1 capacity=$2 seed=$3 student=$4
    wanted "$name" || return 0
    shift 4
    # a student whose evaluation is at hand but whose weights are not is the same when made again
    [ -e "$checkpoints/$student.pt" ] || python actor_distill.py --env-id "$game" --seed "$seed" \
        --buffer-path "$buffer" --capacity "$capacity" --epochs 10 --eval-steps 0 \
        --save-path "$checkpoints/$student.pt" $sgd $([[ $student =~ value ]] && echo --value-coef 0.5)
    run "$name" "$name" "$student" finetune_student.py --capacity "$capacity" --student-path "$checkpoints/$student.pt" \
        --seed "$seed" --save-path "$checkpoints/$name.pt" $tuned "$@"
}

! wanted teacher || run teacher teacher "" ppo_atari_teacher.py --eval-only "$teacher"
for capacity in medium low; do
    for seed in $seeds; do
        distil ad $capacity "$seed" 10 0
        finetune "tuned_${capacity}_$seed" $capacity "$seed" "ad10_${capacity}_$seed"
    done
    seed=${seeds%% *}
    distil ad $capacity "$seed" 50 10
    distil ad $capacity "$seed" 100 50
done
# does the untrained critic hurt?
distil value medium "$seed" 10 0 --value-coef 0.5
finetune "tuned_value_medium_$seed" medium "$seed" "value10_medium_$seed"
for capacity in medium low; do
    ! wanted "direct_${capacity}_$seed" || run "direct_${capacity}_$seed" "direct_${capacity}_$seed" "" \
        ppo_atari_teacher.py --capacity $capacity --seed "$seed" \
        --save-path "$checkpoints/direct_${capacity}_$seed.pt" $direct
done
