"""ManifoldGD's correction of one latent: through the K×K Gram matrix, and through the D×D covariance as released.

Both compute scale · tanh(d_min / bandwidth) · unit(−P_N (x − μ)) for the same x and the same cloud of 300 points; D = 4096 is an ImageNet latent.
    python bench/manifold_correction.py [--dimensions 4096] [--repeats 20]
"""
import argparse
import statistics
import time

import torch

from ddkit.guidance import manifold_pull


def dense_pull(x, cloud, neighbours=12, tangent_dim=3, scale=0.1, bandwidth=0.2, ridge=1e-5):
    "The same correction of one x (D) with a full eigendecomposition of the ridged D×D covariance."
    distances = (cloud - x).norm(dim=1)
    points = cloud[distances.topk(neighbours, largest=False).indices]
    centred = points - points.mean(0)
    covariance = centred.T @ centred / (neighbours - 1) + ridge * torch.eye(len(x))
    leading = torch.linalg.eigh(covariance).eigenvectors[:, -tangent_dim:]
    away = x - points.mean(0)
    to_plane = leading @ (leading.T @ away) - away
    return scale * torch.tanh(distances.min() / bandwidth) * to_plane / to_plane.norm()


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--dimensions", type=int, default=4096)
parser.add_argument("--repeats", type=int, default=20, help="of the Gram matrix; the dense way is timed once, it takes long enough")
options = parser.parse_args()

generator = torch.Generator().manual_seed(0)
x = torch.randn(1, options.dimensions, generator=generator)
cloud = 0.1 * x.unsqueeze(1) + torch.randn(1, 300, options.dimensions, generator=generator)

manifold_pull(x, cloud)  # warm up
gram = [timed(lambda: manifold_pull(x, cloud)) for _ in range(options.repeats)]
gram_time, result = statistics.median(t for t, _ in gram), gram[0][1][0]
dense_time, reference = timed(lambda: dense_pull(x[0], cloud[0]))
difference = ((result - reference).norm() / reference.norm()).item()

print(f"manifold correction of one latent, D = {options.dimensions}, {torch.get_num_threads()} threads")
print(f"  dense {options.dimensions}×{options.dimensions} eigendecomposition  {dense_time * 1e3:12.1f} ms   once")
print(f"  12×12 Gram matrix              {gram_time * 1e3:12.2f} ms   median of {options.repeats}")
print(f"  ratio {dense_time / gram_time:,.0f}×, relative difference of the results {difference:.1e}")
