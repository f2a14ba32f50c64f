# Functions that the scripts share: find Python, choose and print default paths, start a program.
# Every script does `source common.sh`, then chooses its inputs, then runs a program.
#
# Paths: what the user gives is relative to the folder the script was called from; the script's own defaults are under $root.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ ! "$root" -ef . ]] || root=. # called from the checkout: print short paths
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # for tool, which runs files in tools/

# say MESSAGE: print one line to standard error, with the script's name in front.
say() { echo "[$(basename "$0")] $*" >&2; }

# fail MESSAGE: print one line and exit with status 2, the status of a user's mistake.
fail() { say "error: $*"; exit 2; }

# check_gpu_argument GPU_ID ...: exit with a usage line unless the first argument is a GPU number or cpu.
check_gpu_argument() {
    [[ "${1:-}" =~ ^([0-9]+|cpu)$ ]] ||
        fail "usage: bash script/$(basename "$0") GPU_ID [flags]; GPU_ID must be a number or cpu"
}

# can_import PYTHON MODULE ...: return 0 if this Python imports all modules.
can_import() {
    local python=$1 modules
    shift
    modules=$(IFS=,; echo "$*")
    "$python" -c "import $modules" >/dev/null 2>&1
}

# find_python [REQUIREMENTS [MODULE ...]]: set PYTHON to an interpreter that imports everything the programs need.
# $PYTHON is used if it is set. Otherwise .venv, then the python3 on the PATH. If neither imports everything, create
# .venv and install REQUIREMENTS (default: requirements.txt) into it. MODULE ... are needed besides the programs' own.
find_python() {
    local requirements=$root/${1:-requirements.txt}
    shift || true
    local modules=(torch torchvision torchmetrics sklearn numpy PIL tqdm tensorboard matplotlib jinja2 "$@")
    if [[ -n "${PYTHON:-}" ]]; then
        can_import "$PYTHON" "${modules[@]}" ||
            fail "$PYTHON cannot import all of ${modules[*]}: $PYTHON -m pip install -r $requirements"
        return
    fi
    for PYTHON in "$root/.venv/bin/python" python3; do
        if command -v "$PYTHON" >/dev/null && can_import "$PYTHON" "${modules[@]}"; then
            return
        fi
    done
    PYTHON=$root/.venv/bin/python
    if [[ ! -x $PYTHON ]]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "Python 3.10 or newer is needed"
        say "creating $root/.venv"
        python3 -m venv "$root/.venv" || fail "python3 -m venv failed (on Debian: apt install python3-venv)"
    fi
    say "installing $requirements into $root/.venv (one to a few minutes)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements" || fail "pip failed on $requirements"
    can_import "$PYTHON" "${modules[@]}" ||
        fail "the installed packages cannot be imported: delete $root/.venv and run this script again"
}

# tool NAME FLAG ...: run tools/NAME.py.
tool() { "$PYTHON" "$root/tools/$1.py" "${@:2}"; }

# make_example_images: create $root/data/example unless it exists.
make_example_images() {
    if [[ ! -f $root/data/example/settings.json ]]; then
        say "no images given: making example images in $root/data/example (once)"
        tool example --out "$root/data/example"
    fi
}

# choose VARIABLE DESCRIPTION CANDIDATE ...: keep the variable if the environment sets it. Otherwise set it to the first
# candidate that exists, or to "" if none exists. Print the choice.
choose() {
    local variable=$1 description=$2 candidate
    shift 2
    if [[ -n "${!variable:-}" ]]; then
        say "$description: ${!variable} (from $variable)"
        return
    fi
    printf -v "$variable" '%s' ""
    for candidate in "$@"; do
        if [[ -e "$candidate" ]]; then
            printf -v "$variable" '%s' "$candidate"
            say "$description: $candidate"
            return
        fi
    done
}

# choose_images SPLIT KIND REAL FAKE: set DATA_ROOT_POS and DATA_ROOT_NEG.
# The environment comes first, then the folders REAL and FAKE under data/, then the example images of that split and
# kind. Example images never complete a pair of which the user has given or stored one half.
choose_images() {
    local split=$1 kind=$2 real=$root/data/$3 fake=$root/data/$4
    if [[ -z "${DATA_ROOT_POS:-}${DATA_ROOT_NEG:-}" && ! -e "$real" && ! -e "$fake" ]]; then
        make_example_images
        real=$root/data/example/$split/real
        fake=$root/data/example/$split/$kind
    fi
    choose DATA_ROOT_POS "real images" "$real"
    choose DATA_ROOT_NEG "generated images" "$fake"
    [[ -n "$DATA_ROOT_POS" ]] || fail "found generated images in $DATA_ROOT_NEG but no real images in $real: set DATA_ROOT_POS"
    [[ -n "$DATA_ROOT_NEG" ]] || fail "found real images in $DATA_ROOT_POS but no generated images in $fake: set DATA_ROOT_NEG"
}

# choose_resynthesizer RELEASED: set SR_RESUME to the released file, or to what train_super_resolution_celeba.sh wrote.
choose_resynthesizer() {
    choose SR_RESUME "re-synthesizer" "$1" "$root/output_hr/x4/best.pth" "$root/output_hr/x4/last.pth"
    [[ -n "$SR_RESUME" ]] || fail "no re-synthesizer at $1 or in $root/output_hr/x4:" \
        "run script/train_super_resolution_celeba.sh first, or set SR_RESUME"
}

# choose_detector RELEASED RELEASED_RDN SCRIPT FOLDER ...: set RESUME to the released file or to what SCRIPT wrote into
# one of the folders. A released detector has its RDN in a file of its own, so SR_RESUME is chosen for it, too.
choose_detector() {
    local released=$1 released_rdn=$2 script=$3 folder candidates=()
    shift 3
    for folder in "$@"; do
        candidates+=("$folder/best.pth.tar" "$folder/last.pth.tar")
    done
    choose RESUME "detector" "$released" "${candidates[@]}"
    [[ -n "$RESUME" ]] || fail "no detector at $released or in $*: run script/$script first, or set RESUME"
    if [[ "$RESUME" == "$released" ]]; then
        choose_resynthesizer "$released_rdn"
    elif [[ -n "${SR_RESUME:-}" ]]; then
        say "re-synthesizer: $SR_RESUME (from SR_RESUME)"
    else
        say "re-synthesizer: the one inside $RESUME"
    fi
}

# train_once FILE PROGRAM FLAG ...: run a training program on $gpu unless FILE, the last file it writes, exists.
# An earlier run that was stopped is resumed.
train_once() {
    local file=$1 program=$2
    shift 2
    if [[ -f "$file" ]]; then
        say "$file exists already"
        return
    fi
    say "$program $*"
    "$PYTHON" "$root/$program" --gpu "$gpu" --resume auto "$@" ${VGG_WEIGHTS:+--vgg-weights "$VGG_WEIGHTS"}
}

# run PROGRAM FLAG ...: replace this shell by the program, or by torchrun with $NPROC processes of it.
run() {
    local launcher=("$PYTHON") program=$1
    shift
    if [[ "${NPROC:-1}" -gt 1 ]]; then
        launcher+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC")
        if [[ -z "${OMP_NUM_THREADS:-}" ]]; then # torchrun's own default is one thread per process
            export OMP_NUM_THREADS=$("$PYTHON" -c "import os; print(max(1, (os.cpu_count() or 1) // $NPROC))")
        fi
        say "starting $NPROC processes with torchrun"
    fi
    exec "${launcher[@]}" "$root/$program" "$@" ${VGG_WEIGHTS:+--vgg-weights "$VGG_WEIGHTS"}
}
