# Functions that all scripts use: find Python, choose and print default paths, start a program.
# Every script runs `source common.sh`, chooses its inputs, and then starts a program.
#
# Paths from the user are relative to the working folder. Default paths of a script are in $root, the checkout.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ ! "$root" -ef . ]] || root=. # if the checkout is the working folder, print short paths
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # for the imports of programs in tools/

# say MESSAGE: print the name of the script and MESSAGE as one line to standard error.
say() { echo "[$(basename "$0")] $*" >&2; }

# fail MESSAGE: print MESSAGE as one error line, and exit with status 2.
fail() { say "error: $*"; exit 2; }

# check_gpu_argument GPU_ID ...: exit with a usage line unless the first argument is a GPU number or cpu.
check_gpu_argument() {
    [[ "${1:-}" =~ ^([0-9]+|cpu)$ ]] ||
        fail "usage: bash script/$(basename "$0") GPU_ID [flags]; GPU_ID must be a number or cpu"
}

# can_import PYTHON MODULE ...: return 0 if the Python interpreter can import all modules.
can_import() {
    local python=$1 modules
    shift
    modules=$(IFS=,; echo "$*")
    "$python" -c "import $modules" >/dev/null 2>&1
}

# find_python [REQUIREMENTS [MODULE ...]]: set PYTHON to an interpreter that can import all modules of the programs.
# If PYTHON is set already, it is used. Otherwise, .venv is tried, and then the python3 on the PATH. If a module is
# missing in both, .venv is created, and REQUIREMENTS (default: requirements.txt) is installed into .venv.
# MODULE ... are modules that are needed besides those of the programs.
find_python() {
    local requirements=$root/${1:-requirements.txt}
    shift || true
    local modules=(torch torchvision torchmetrics sklearn numpy PIL tqdm tensorboard matplotlib jinja2 "$@")
    if [[ -n "${PYTHON:-}" ]]; then
        can_import "$PYTHON" "${modules[@]}" ||
            fail "$PYTHON cannot import all of ${modules[*]}: run $PYTHON -m pip install -r $requirements"
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

# tool NAME FLAG ...: run the program tools/NAME.py.
tool() { "$PYTHON" "$root/tools/$1.py" "${@:2}"; }

# count_images FOLDER ...: print the number of images in all folders together.
count_images() {
    "$PYTHON" -c 'import sys
sys.path.pop(0) # do not import modules from the working folder
from data.folders import find_images
from utils.errors import run_program
sys.exit(run_program(lambda: print(sum(len(find_images(folder)) for folder in sys.argv[1:]))))' "$@"
}

# make_example_images: create $root/data/example unless it exists.
make_example_images() {
    if [[ ! -f $root/data/example/settings.json ]]; then
        say "no images were given: making example images in $root/data/example"
        tool example --out "$root/data/example"
    fi
}

# choose VARIABLE DESCRIPTION CANDIDATE ...: choose a path for a variable, and print the path.
# If the environment sets VARIABLE, its value is kept. Otherwise, VARIABLE is set to the first candidate that exists, or to
# "" if no candidate exists.
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
# If the environment sets a variable, its value is kept. Otherwise, the folders data/REAL and data/FAKE are used. If neither
# the variables nor the folders exist, the example images of SPLIT and KIND are used. Example images are never combined
# with images of the user.
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

# choose_resynthesizer RELEASED: set SR_RESUME to the released file or to the output of train_super_resolution_celeba.sh.
choose_resynthesizer() {
    choose SR_RESUME "re-synthesizer" "$1" "$root/output_hr/x4/best.pth" "$root/output_hr/x4/last.pth"
    [[ -n "$SR_RESUME" ]] || fail "found no re-synthesizer at $1 or in $root/output_hr/x4:" \
        "run script/train_super_resolution_celeba.sh first, or set SR_RESUME"
}

# choose_detector RELEASED RELEASED_RDN SCRIPT FOLDER ...: set RESUME to the released file, or to a checkpoint in one of the
# folders, into which SCRIPT writes. The RDN of a released detector is in a separate file, so SR_RESUME is also chosen.
choose_detector() {
    local released=$1 released_rdn=$2 script=$3 folder candidates=()
    shift 3
    for folder in "$@"; do
        candidates+=("$folder/best.pth.tar" "$folder/last.pth.tar")
    done
    choose RESUME "detector" "$released" "${candidates[@]}"
    [[ -n "$RESUME" ]] || fail "found no detector at $released or in $*: run script/$script first, or set RESUME"
    if [[ "$RESUME" -ef "$released" ]]; then
        choose_resynthesizer "$released_rdn"
    elif [[ -n "${SR_RESUME:-}" ]]; then
        say "re-synthesizer: $SR_RESUME (from SR_RESUME)"
    else
        say "re-synthesizer: the one inside $RESUME"
    fi
}

# train_once FILE PROGRAM FLAG ...: run a training program on $gpu, unless the training is finished already. If an earlier
# training was stopped, the training is resumed. FILE is the numbered checkpoint of the last epoch. The training is
# finished if FILE exists and last.pth or last.pth.tar, which the program saves after FILE, is not older.
train_once() {
    local file=$1 program=$2 last
    shift 2
    last=$(dirname "$file")/last.pth
    [[ "$file" != *.pth.tar ]] || last+=.tar
    if [[ -f "$file" && ! "$last" -ot "$file" ]]; then
        say "$file exists already, so $program is not started"
        return
    fi
    say "$program $*"
    "$PYTHON" "$root/$program" --gpu "$gpu" --resume auto "$@" ${VGG_WEIGHTS:+--vgg-weights "$VGG_WEIGHTS"}
}

# run PROGRAM FLAG ...: replace this shell by PROGRAM, or by torchrun with $NPROC processes of PROGRAM.
run() {
    local launcher=("$PYTHON") program=$1
    shift
    if [[ "${NPROC:-1}" -gt 1 ]]; then
        launcher+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC")
        if [[ -z "${OMP_NUM_THREADS:-}" ]]; then # without this variable, torchrun uses one thread per process
            export OMP_NUM_THREADS=$("$PYTHON" -c "import os; print(max(1, (os.cpu_count() or 1) // $NPROC))")
        fi
        say "starting $NPROC processes with torchrun"
    fi
    exec "${launcher[@]}" "$root/$program" "$@" ${VGG_WEIGHTS:+--vgg-weights "$VGG_WEIGHTS"}
}
