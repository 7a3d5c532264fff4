"""Signs in the numbers of an evaluation that a generator has failed, which a single number may hide."""

from collections.abc import Mapping


def signs(metrics: Mapping[str, Mapping[str, float]], closed: float) -> list[str]:
    """What is wrong with a generator, as sentences.

    Args:
        metrics: by method, as in metrics.json: "teacher" and "generator" are compared.
        closed: the share of the gap that is closed.
    """
    teacher, generator = metrics["teacher"], metrics["generator"]

    def share(name: str) -> float:
        return generator[name] / teacher[name] if teacher.get(name, 0.0) > 0 and name in generator else 1.0

    said = []
    if closed < 0:
        said.append("failed: the generator is farther from the reference than independent tokens are; look at its curves")
    if (varied := share("within_class_spread")) < 0.75:
        said.append(f"collapse: images of one class vary {varied:.0%} as much as the teacher's")
    if (recalled := share("recall")) < 0.75 and share("precision") > 0.95:
        said.append(f"collapse: precision is the teacher's, recall {recalled:.0%} of its: what is drawn is good, and little")
    if share("teacher_nll") < 0.97:
        nats = f"{generator['teacher_nll']:.1f} against {teacher['teacher_nll']:.1f} nats"
        said.append(f"collapse: sequences are likelier to the teacher than its own ({nats}): they are its most usual ones")
    own = generator.get("frechet", 0.0)
    lag = metrics["guidance"]["frechet"] / own if own > 0 and "guidance" in metrics else 0.0
    if lag > 1.1:
        said.append(
            f"lagging guidance: what the guidance network draws is {lag:.1f} times as far from the reference as what the "
            "generator does, which it should know; raise csd.k, or align (align.iterations, App. C.3)"
        )
    return said
