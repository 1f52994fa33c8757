"""Experiment: what the tests try of faults and of other people's code, as tables for docs/faults.md; see tables.py.

The rows are the tests' own parameters: what a test does not try cannot stand in the table.
"""

import importlib
import itertools
import sys
import types

from harness import runs

# kind -> the tests of it, as module::function; a test with parameters tries each of them
KINDS = {
    "meta-gradients that are not finite": (
        "test_pipeline::test_a_meta_step_without_any_finite_meta_gradient_changes_nothing",
        "test_pipeline::test_a_task_without_a_finite_meta_gradient_is_skipped",
        "test_pipeline::test_a_diverged_unit_is_left_out_counted_and_reset",
        "test_faults::test_a_task_lost_for_good_ends_the_run_and_is_named",
        "test_faults::test_a_task_that_loses_most_meta_steps_is_lost_and_one_that_loses_half_is_not",
    ),
    "runs that are stopped": (
        "test_faults::test_an_interrupted_run_resumes_to_the_same_bits",
        "test_faults::test_a_full_disk_ends_the_run_in_one_line_with_the_checkpoint_before_it_whole",
        "test_faults::test_a_full_disk_ends_an_evaluation_in_one_line",
        "test_programs::test_a_killed_evaluation_continues_to_the_same_result_and_runs_nothing_twice",
        "test_programs::test_an_evaluation_killed_or_out_of_time_inside_a_run_continues_to_the_same_bits",
        "test_agents::test_agents_under_way_continue_where_they_were_kept",
    ),
    "folders": (
        "test_programs::test_a_finished_run_without_its_checkpoints_is_not_begun_again",
        "test_programs::test_a_run_is_never_overwritten",
        "test_runs::test_a_folder_that_is_in_use_is_refused",
        "test_runs::test_a_config_of_another_version_is_refused",
        "test_checkpoints::test_no_damaged_file_goes_unnoticed",
    ),
    "weight files": (
        "test_weights::test_weights_that_are_not_what_they_should_be_are_refused",
        "test_weights::test_damaged_files_are_refused",
    ),
    "agents and scores": (
        "test_agents::test_an_agent_whose_parameters_are_not_finite_has_no_return",
        "test_agents::test_a_diverged_candidate_is_never_chosen",
        "test_agents::test_agents_of_one_run_share_no_random_numbers",
        "test_statistics::test_a_diverged_run_counts_as_the_worst_and_too_many_make_the_mean_worthless",
        "test_statistics::test_a_baseline_that_is_not_surely_above_zero_leaves_its_task_out_and_says_so",
        "test_statistics::test_the_better_baseline_is_chosen_on_the_tuning_seeds_and_is_1_in_its_own_units",
        "test_statistics::test_one_diverged_run_of_a_baseline_changes_no_other_optimizers_place",
    ),
    "machines": (
        "test_runs::test_all_gpus_of_a_slurm_node_are_taken_by_its_only_task",
        "test_runs::test_cores_are_those_that_the_process_may_use",
        "test_runs::test_the_environments_cache_folder_comes_first",
        "test_runs::test_impossible_processes_are_refused",
        "test_faults::test_processes_that_were_started_with_different_flags_are_refused",
        "test_programs::test_a_program_that_is_called_where_jax_runs_already_takes_the_devices_that_are_there",
        "test_runs::test_a_gridworld_program_needs_no_brax",
    ),
    "flags": (
        "test_programs::test_flags_that_do_not_exist_are_refused_in_a_few_lines",
        "test_programs::test_impossible_meta_training_is_refused",
        "test_programs::test_impossible_evaluations_are_refused",
        "test_runs::test_empty_values_are_refused",
        "test_drift::test_bad_digits_end_with_one_line_that_names_them",
    ),
}


def tests_module(name):
    if (folder := str(runs.ROOT / "tests")) not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def parameters(function):
    """What a test is tried with: texts, one per case; none where it has no parameters."""
    lists = [[parameter_text(x) for x in mark.args[1]] for mark in getattr(function, "pytestmark", ())]
    return [", ".join(case) for case in itertools.product(*lists)] if lists else []


def parameter_text(x):
    if isinstance(x, types.ModuleType):
        return x.__name__
    if callable(x):
        return getattr(x, "__name__", "a change").replace("<lambda>", "a change")
    text = ", ".join(map(parameter_text, x)) if isinstance(x, tuple) else str(x)
    return " ".join(text.replace("|", "/").split())[:90]


def faults():
    """A line per test: kind, what is right, what is tried."""
    lines = ["| kind | what the test says | tried with |", "| --- | --- | --- |"]
    for kind, tests in KINDS.items():
        for test in tests:
            module, function = test.split("::")
            cases = parameters(getattr(tests_module(module), function))
            says = function.removeprefix("test_").replace("_", " ")
            lines.append(f"| {kind} | {says} | {'; '.join(f'`{case}`' for case in cases) or 'one case'} |")
    return "\n".join(lines)


def guests():
    """A line per situation of tests/test_guests.py, a column per optimizer."""
    module = tests_module("test_guests")
    lines = [f"| situation | {' | '.join(module.OPTIMIZERS)} |", "| --- |" + " --- |" * len(module.OPTIMIZERS)]
    for situation in (*module.ALL, *module.ONLY_LEARNED):
        not_run = {"adam"} if situation in module.ONLY_LEARNED else set()
        outcome = lambda name, s=situation, n=not_run: (
            "-" if name in n else "no, by method" if (name, s.__name__) in module.NOT_EXPECTED else "yes"
        )
        lines.append(f"| {situation.__name__.replace('_', ' ')} | {' | '.join(map(outcome, module.OPTIMIZERS))} |")
    return "\n".join(lines)
