#!/bin/sh
# Mutants of the gates and the statistics: all of them, or a random sample (SAMPLE=500, SEED=7), and how many were killed.
set -eu
mutmut=.venv/bin/mutmut
if [ -z "${SAMPLE:-}" ]; then
    $mutmut run
else
    $mutmut run --max-children 1 'no such mutant' >/dev/null 2>&1 || true  # writes the mutants and times the tests
    names=$($mutmut results --all true | sed -n 's/^ *\([^ ]*__mutmut_[0-9]*\): .*/\1/p' | sort |
        .venv/bin/python -c "import random, sys; names = sys.stdin.read().split(); random.seed(${SEED:-7}); print(*random.sample(names, $SAMPLE))")
    $mutmut run $names
fi
$mutmut results --all true | .venv/bin/python -c "
import collections, sys
counts = collections.Counter(line.split(': ')[1].strip() for line in sys.stdin if '__mutmut_' in line)
del counts['not checked']
print(f'killed {counts[\"killed\"]} of {counts.total()} mutants: {counts[\"killed\"] / counts.total():.1%}', dict(counts))"
