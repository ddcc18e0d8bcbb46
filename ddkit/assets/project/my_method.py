"""A method of your own. What this file registers is known under the profiles that name it in `plugins`."""

import torch
from ddkit.methods import register


@register("typical", needs=())  # it needs neither latents nor a network prepared first
def typical(workshop, power: float = 2.0):
    "The real images closest to the mean of their class."
    real, chosen = workshop.data.train, []
    for label in range(len(workshop.data.classes)):
        members = real.of_class(label)
        images = real.batch(members)
        distances = (images - images.mean(0)).abs().pow(power).flatten(1).sum(1)
        chosen.append(images[distances.topk(workshop.ipc, largest=False).indices])
    return torch.cat(chosen)  # N×C×H×W in [−1, 1], class by class
