"""Which teacher layer each student layer learns from. Layers are counted from 0, as in Hugging
Face."""

Pairs = list[tuple[int, int]]  # (student layer, teacher layer)


def layer_pairs(layers: object, student_layers: int, teacher_layers: int) -> Pairs:
    """`uniform`: the teacher is cut into equal segments and each student layer learns from the last
    of its own. `last`: the two last layers. Else explicit [[student, teacher], ...]. ValueError
    where a layer does not exist."""
    if layers == "uniform":
        if student_layers > teacher_layers:
            raise ValueError(
                f"layers: uniform needs a student no deeper than its teacher; it has "
                f"{student_layers} layers and the "
                f"teacher {teacher_layers}. Give the pairs [[student, teacher], ...] yourself."
            )
        return [(k, (k + 1) * teacher_layers // student_layers - 1) for k in range(student_layers)]
    if layers == "last":
        return [(student_layers - 1, teacher_layers - 1)]
    if not is_pairs(layers):
        raise ValueError(
            f"layers: {layers!r} is not uniform, last, or pairs [[student, teacher], ...]."
        )
    for student, teacher in layers:
        for layer, count, who in (
            (student, student_layers, "student"),
            (teacher, teacher_layers, "teacher"),
        ):
            if not 0 <= layer < count:
                raise ValueError(
                    f"layers: pair [{student}, {teacher}] names layer {layer} of the {who}, "
                    f"which has layers 0 to {count - 1}."
                )
    return [(student, teacher) for student, teacher in layers]


def is_pairs(layers: object) -> bool:
    return (
        isinstance(layers, list)
        and len(layers) > 0
        and all(
            isinstance(p, list | tuple) and len(p) == 2 and all(type(i) is int for i in p)
            for p in layers
        )
    )
