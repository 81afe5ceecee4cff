#!/usr/bin/env bash
# The students of one strong teacher, by all defaults, and what fine-tuning is worth to a low one. Each run
# is recorded in benchmark/results/students/, from which `python benchmark/tables.py` makes the tables.
#
#     bash benchmark/students.sh QbertNoFrameskip-v4 qbert_acktr.pt "1 2 3"
#     bash benchmark/students.sh QbertNoFrameskip-v4 qbert_acktr.pt "1 2 3" ".*_low_.*"   # only the runs so named
#
# Arguments: the game, the file of another project's teacher, the seeds, and a pattern of names. All
# fine-tuning begins with the first seed's student, or without its file with the one that ships. What is
# recorded is not run again, and what was stopped goes on.
set -euo pipefail
trap 'exit 130' INT TERM
game=$1 teacher=$2 seeds=$3 only=${4:-.*}
short=${game%NoFrameskip-v4} name=${teacher##*/} first=${seeds%% *}
short=${short,,} name=${name%.*}
name=${short}_${name#"${short}_"}
results=benchmark/results/students/$name.jsonl weights=checkpoints/$game buffer=buffers/$name.npz
export OMP_NUM_THREADS=1

wanted() {  # name
    [[ $1 =~ ^($only)$ ]] && ! grep -qs "^{\"name\": \"$1\"," "$results"
}

run() {  # name, script, flags; the time of what was stopped counts too
    local line=$1 experiment=${name}_$1
    wanted "$line" || return 0
    set -- "${@:2}" --env-id "$game" --exp-name "$experiment"
    mkdir -p "$weights"
    echo "== $line: python $*"
    /usr/bin/time --quiet --append --output "$weights/$experiment.times" --format %U python "$@"
    python benchmark/record.py "$(ls -dt runs/"${game}__${experiment}__"* | head -n 1)" "$results" --name "$line" \
        --command "python $*" --seconds "$(awk '{ sum += $1 } END { print sum }' "$weights/$experiment.times")"
}

path() { echo "$weights/${name}_$1.pt"; }

buffer_flags="--teacher-path $teacher --buffer-path $buffer --num-samples 540_000 --num-envs 128"
run teacher collect_buffer.py $buffer_flags --eval-steps 200_000 --overwrite
student=$(path "ad_low_$first")
for seed in $seeds; do
    for capacity in low medium; do
        [[ -e $buffer ]] || ! wanted "ad_${capacity}_$seed" ||
            python collect_buffer.py --env-id "$game" $buffer_flags --eval-steps 0
        run "ad_${capacity}_$seed" actor_distill.py --buffer-path "$buffer" --capacity $capacity --seed "$seed" \
            --save-path "$(path "ad_${capacity}_$seed")" --resume --eval-steps 100_000
    done
    [[ -e $student ]] || student=pretrained/$game/acktr_low.pt
    run "tuned_low_$seed" finetune_student.py --student-path "$student" --capacity low --seed "$seed" \
        --save-path "$(path "tuned_low_$seed")" --resume --eval-steps 100_000 --total-timesteps 270_000
done
