"""Continue a sampler's study that was cut short: what it finished counts, and what it had begun is proposed again first."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from components.contracts import UserError

FAR = 1000  # keeps the seeds of a sampler's continuations apart
REPLACED = "replaced"  # mark of a trial that was cut short and is proposed again


def continue_study(config: DictConfig) -> list[str]:
    """Prepare the stored study of a sweep for going on; returns words that replace the sampler's: trials left, and another seed, since the
    same one would propose again what was tried.

    Raises:
        UserError: the sweep has no storage, so that nothing of it is known.
    """
    import optuna

    sweeper: Any = OmegaConf.to_container(config.hydra, resolve=False)["sweeper"]  # type: ignore[call-overload,index]
    storage, name = config.hydra.sweeper.get("storage"), config.hydra.sweeper.get("study_name")
    if not storage or not name:
        raise UserError("resume: this sweep kept no study; set hydra.sweeper.storage and hydra.sweeper.study_name (see conf/sweep/)")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:  # killed before it was made
        return []
    state = optuna.trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(state.RUNNING,)):
        optuna.trial.Trial(study, trial._trial_id).set_user_attr(REPLACED, True)
        study.tell(trial.number, state=state.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params)
    tried = sum(trial.state.is_finished() and not trial.user_attrs.get(REPLACED) for trial in study.get_trials(deepcopy=False))
    words = [f"hydra.sweeper.n_trials={max(0, int(config.hydra.sweeper.n_trials) - tried)}"]
    seed = sweeper.get("sampler", {}).get("seed")
    if isinstance(seed, int):
        words.append(f"hydra.sweeper.sampler.seed={seed + FAR * (1 + tried)}")
    return words
