"""Program: what a run of meta-training survives, tried on real processes, files and a small file system; prints the tally.

    python -m benchmarks.faults                      # all of it, 15 minutes on 2 CPU cores
    python -m benchmarks.faults --kills 3 --out tally.md

Every case ends like the run that nothing disturbed: the same bits of the weights, the same metrics.csv but for the seconds.
The full disk is a mounted file system of a few MB, which needs Linux and the right to make user namespaces.
"""

import argparse
import csv
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from harness import runs, weights

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 60
FLAGS = "--preset gradient --tasks small_dense_short catch --num-units 4 --reset-interval 3 --test-tasks , "
FLAGS += f"--meta-steps {STEPS} --checkpoint-every"


def start(flags, before=()):
    command = [*before, sys.executable, str(ROOT / "meta_train.py"), *flags.split()]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(flags):
    """Runs to the end; returns (exit status, last line of its errors)."""
    process = start(flags)
    _, err = process.communicate()
    return process.returncode, err.splitlines()[-1] if err else ""


def flags_to_continue(folder):
    """Flags that resume a run, or begin it where it was killed before its config was written."""
    return f"--resume {folder}" if (folder / "config.json").exists() else f"{FLAGS} 0.3 --out {folder}"


def same(folder, sound):
    """Whether two runs have the same weights and the same rows, all of them, once each."""
    learned = [jax.tree.leaves(weights.load(path / "optimizer.npz")[0]) for path in (folder, sound)]
    rows = []
    for path in (folder, sound):
        with open(path / "metrics.csv", newline="") as file:
            rows.append([row | {"seconds": ""} for row in csv.DictReader(file)])
    return all(map(np.array_equal, *learned)) and rows[0] == rows[1] and len(rows[0]) == STEPS


def killed(work, sound, number, wanted):
    """Signals at random moments of starting, compiling, learning and saving: (signals sent, runs finished, runs that differ)."""
    moments, sent, differing, ended = random.Random(int(number)), 0, 0, 0
    while sent < wanted:
        folder, done = work / f"{number.name}-{ended}", False
        while not done:
            process = start(flags_to_continue(folder))
            try:
                process.wait(moments.uniform(0, 20) if sent < wanted else None)
                done = process.returncode == 0
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                process.wait()
                sent += 1
        ended, differing = ended + 1, differing + (not same(folder, sound))
        print(f"  {number.name}: {sent} of {wanted} sent", flush=True)
    return sent, ended, differing


def damaged(work, sound, wanted):
    """Files of the newest checkpoint cut to half, or with one byte changed: (cases, refused, runs that differ)."""
    newest = sound / "checkpoints" / str(STEPS)
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    cases = random.Random(0).sample([(file, cut) for file in files for cut in (True, False)], wanted)
    refused, differing = 0, 0
    for file, cut in cases:
        folder = work / "damaged"
        shutil.copytree(sound, folder)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x10
        (folder / file.relative_to(sound)).write_bytes(content[: len(content) // 2] if cut else content)
        status, line = finish(f"--resume {folder}")
        if status == 2 and "remove it to go on from" in line:
            refused += 1
            shutil.rmtree(folder / "checkpoints" / str(STEPS))
            status, _ = finish(f"--resume {folder}")
        differing += status != 0 or not same(folder, sound)
        shutil.rmtree(folder)
    return len(cases), refused, differing


def full_disk(work, sound, sizes):
    """Runs on mounted file systems of so many MB: (runs, stopped in one line by a full disk, runs that differ when resumed)."""
    stopped, differing = 0, 0
    for size in sizes:
        mount, folder = work / f"disk-{size}", work / f"copy-{size}"
        mount.mkdir()
        # The file system lasts as long as its namespace: what it held is copied out before that ends.
        script = (
            f'mount -t tmpfs -o size={size}m tmpfs {mount}; "$@"; status=$?; cp -r {mount}/run {folder}; exit $status'
        )
        process = start(f"{FLAGS} 0.3 --out {mount}/run", before=("unshare", "-rm", "sh", "-c", script, "sh"))
        _, err = process.communicate()
        line = err.splitlines()[-1]
        stopped += process.returncode == 1 and line.startswith("cannot write to") and "No space left" in line
        status, _ = finish(f"--resume {folder}")
        differing += status != 0 or not same(folder, sound)
    return len(sizes), stopped, differing


def tally(kills):
    """Rows of (what was done, how often, what came of it)."""
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        sound = work / "sound"
        began = time.time()
        status, line = finish(f"{FLAGS} 0.3 --out {sound}")
        if status:
            raise SystemExit(f"the undisturbed run failed: {line}")
        print(f"  an undisturbed run takes {time.time() - began:.0f} s", flush=True)
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            sent, ended, differing = killed(work, sound, number, kills if number == signal.SIGKILL else kills // 4)
            yield (
                f"{number.name} at a random moment",
                sent,
                f"{ended} runs ended, {differing} differ from an undisturbed one",
            )
        cases, refused, differing = damaged(work, sound, 12)
        result = f"{refused} refused in one line, the others no loss; {differing} differ when continued as it says"
        yield "a file of the newest checkpoint cut to half, or one byte of it changed", cases, result
        if shutil.which("unshare") and not subprocess.run(("unshare", "-rm", "true"), check=False).returncode:
            disks, stopped, differing = full_disk(work, sound, (4, 7, 10))
            result = f"{stopped} ended in one line that says so, {differing} differ when resumed elsewhere"
            yield "disk of 4, 7, 10 MB full", disks, result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kill -9s; a quarter as many of the other signals (20)")
    parser.add_argument("--out", help="file to write the tally to as a Markdown table; none: print only")
    flags = parser.parse_args()
    if flags.kills < 1:
        raise runs.UsageError(f"--kills is {flags.kills}; it must be at least 1")
    lines = ["| fault | times | what came of it |", "|---|---|---|"]
    lines += [f"| {fault} | {times} | {result} |" for fault, times, result in tally(flags.kills)]
    print("\n".join(lines))
    if flags.out:
        pathlib.Path(flags.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    runs.run(main)
