# What the scripts share: the Python to run, the defaults they choose and say, and how a program is started.
# Each script: source common.sh, choose, run. Environment variables named in `choose` override the defaults.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "[$(basename "$0")] $*" >&2; }
fail() { say "error: $*"; exit 2; }

# usage GPU_ID ...: the first argument of every script is a GPU number or cpu.
usage() {
    [[ "${1:-}" =~ ^([0-9]+|cpu)$ ]] || fail "usage: bash script/$(basename "$0") GPU_ID [flags], GPU_ID a number or cpu"
}

# find_python [REQUIREMENTS [MODULE ...]]: sets PYTHON to this checkout's .venv or the python3 on the PATH: the first
# that can import what is needed. If none can, makes .venv and installs REQUIREMENTS there. $PYTHON, if set, has to do.
find_python() {
    local requirements=${1:-requirements.txt} candidate candidates=(.venv/bin/python python3)
    [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
    shift || true
    local modules="torch torchvision torchmetrics numpy PIL tqdm tensorboard matplotlib $*"
    works() { "$1" -c "import ${modules// /, }" >/dev/null 2>&1; }
    modules=${modules% }
    for candidate in "${candidates[@]}"; do
        if command -v "$candidate" >/dev/null && works "$candidate"; then
            PYTHON=$candidate
            return
        fi
    done
    [[ -z "${PYTHON:-}" ]] || fail "$PYTHON cannot import all of $modules: $PYTHON -m pip install -r $requirements"
    if [[ ! -x .venv/bin/python ]]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "Python 3.10 or newer is needed"
        say "making .venv"
        python3 -m venv .venv || fail "python3 -m venv failed (on Debian: apt install python3-venv)"
    fi
    PYTHON=.venv/bin/python
    say "installing $requirements into .venv (one to a few minutes)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements" || fail "pip failed on $requirements"
    works "$PYTHON" || fail "what pip installed cannot be imported; try: rm -r .venv, then this script again"
}

# example: makes the example images on first use.
example() {
    if [[ ! -f data/example/settings.json ]]; then
        say "no images given: making example images in data/example (once)"
        "$PYTHON" -m tools.example
    fi
}

# choose VARIABLE "what it is" CANDIDATE ...: the variable from the environment, else the first candidate that exists.
# Sets it to "" if there is none. Says what it chose.
choose() {
    local variable=$1 what=$2 candidate
    shift 2
    if [[ -n "${!variable:-}" ]]; then
        say "$what: ${!variable} (from $variable)"
        return
    fi
    printf -v "$variable" '%s' ""
    for candidate in "$@"; do
        if [[ -e "$candidate" ]]; then
            printf -v "$variable" '%s' "$candidate"
            say "$what: $candidate"
            return
        fi
    done
}

# choose_images SPLIT KIND SEED_REAL SEED_FAKE: DATA_ROOT_POS and DATA_ROOT_NEG from the environment, else the seed's
# folders, else the example images of that split and kind. Never half of one and half of the other.
choose_images() {
    local split=$1 kind=$2 real=$3 fake=$4
    if [[ -z "${DATA_ROOT_POS:-}${DATA_ROOT_NEG:-}" && ! -e "$real" && ! -e "$fake" ]]; then
        example
        real=data/example/$split/real fake=data/example/$split/$kind
    fi
    choose DATA_ROOT_POS "real images" "$real"
    choose DATA_ROOT_NEG "generated images" "$fake"
    [[ -n "$DATA_ROOT_POS" ]] || fail "generated images in $DATA_ROOT_NEG, but no real ones in $real: set DATA_ROOT_POS"
    [[ -n "$DATA_ROOT_NEG" ]] || fail "real images in $DATA_ROOT_POS, but no generated ones in $fake: set DATA_ROOT_NEG"
}

# choose_resynthesizer CANDIDATE ...: SR_RESUME, which has to be somewhere.
choose_resynthesizer() {
    choose SR_RESUME "re-synthesizer" "$@" ./output_hr/x4/best.pth ./output_hr/x4/last.pth
    [[ -n "$SR_RESUME" ]] || fail "no re-synthesizer at $1 or in ./output_hr/x4: run" \
        "script/train_super_resolution_celeba.sh first, or set SR_RESUME"
}

# choose_detector SEED_DETECTOR SEED_RDN SCRIPT FOLDER ...: RESUME and, where the detector's file does not hold its
# RDN (the released ones), SR_RESUME.
choose_detector() {
    local seed=$1 seed_rdn=$2 script=$3 folder candidates=()
    shift 3
    for folder in "$@"; do candidates+=("$folder/best.pth.tar" "$folder/last.pth.tar"); done
    choose RESUME "detector" "$seed" "${candidates[@]}"
    [[ -n "$RESUME" ]] || fail "no detector at $seed or in $*: run script/$script first, or set RESUME"
    if [[ "$RESUME" == "$seed" ]]; then
        choose_resynthesizer "$seed_rdn"
    elif [[ -n "${SR_RESUME:-}" ]]; then
        say "re-synthesizer: $SR_RESUME (from SR_RESUME)"
    else
        say "re-synthesizer: the one inside $RESUME"
    fi
}

# trained FILE PROGRAM FLAG ...: runs the program, on $gpu, unless it has written FILE; goes on where a stopped one was.
trained() {
    local file=$1 program=$2
    shift 2
    if [[ -f "$file" ]]; then
        say "$file is there already"
    else
        say "$program $*"
        "$PYTHON" "$program" --gpu "$gpu" --resume auto "$@" ${VGG_WEIGHTS:+--vgg-weights "$VGG_WEIGHTS"}
    fi
}

# run PROGRAM FLAG ...: in NPROC processes if that is set.
run() {
    local launcher=("$PYTHON")
    if [[ "${NPROC:-1}" -gt 1 ]]; then
        launcher=("$PYTHON" -m utils.launch "$NPROC")
        say "in $NPROC processes"
    fi
    exec "${launcher[@]}" "$@" ${VGG_WEIGHTS:+--vgg-weights "$VGG_WEIGHTS"}
}
