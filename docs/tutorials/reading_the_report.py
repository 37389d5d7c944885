# %% [markdown]
# # Reading the report
#
# `megajax run` trains parents, merges them, measures everything once on test images and writes a
# report. This page runs a small experiment and goes through what it says.
#
# ## A run
#
# A config file is a Python program with `get_config()`. This one is small, so that it takes some
# ten seconds.

# %%
import json
import subprocess
import sys
from pathlib import Path

Path("small.py").write_text("""
import megajax as mj


def get_config():
    return mj.Config(
        data=mj.DataConfig(name="digits", validation_fraction=0.3),
        model=mj.ModelConfig(name="mlp", options={"hidden": (64,)}),
        parents=mj.ParentsConfig(shards="skewed", skew=0.95),
        training=mj.TrainingConfig(epochs=10),
        evolution=mj.EvolutionConfig(generations=30),
    )
""")
command = [sys.executable, "-m", "megajax", "run", "--config", "small.py", "--workdir", "run"]
print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

# %% [markdown]
# ## The sentences at the top
#
# They are the answer, and the same ones open `report.md` and `report.html`. Read them in this
# order.
#
# 1. **A remark in front**, if there is one, changes what the figures mean: the search returned a
#    parent, fitness was still rising, this was a smoke run.
# 2. **Merged against the best parent.** The best parent is the one that *validation* chose, because
#    that is the choice you could have made. If another parent is better on the test images, the
#    next sentence compares with that one, too.
# 3. **Against the best method without a search.** If this difference is not clearly above zero, the
#    search was not worth its cost.
# 4. **Against the ensemble**, which runs all parents side by side: what the parents know together,
#    at several times the price.
#
# In this run the third sentence decides: RegMean on aligned parents needs no search and is far
# better than the merged network, so RegMean's network is the one to take.
#
# A difference comes with its 95 % interval, in brackets. If the interval contains zero, this test
# set cannot tell the two apart.
#
# ## The table
#
# `results.json` has what the table has.

# %%
results = json.loads(Path("run/results.json").read_text())
print("parents:", [round(parent["test_accuracy"], 3) for parent in results["parents"]])
print("merged: ", round(results["merged"]["test_accuracy"], 3))
print("search: ", results["evaluations"], "networks scored")

# %% [markdown]
# | column | what it says |
# | --- | --- |
# | test [95 %] | accuracy on images that nothing else has seen, with Wilson's interval |
# | to best parent | the difference in points, on the same images |
# | p (Holm) | of McNemar's exact test, corrected for the number of rows |
# | validation | what choices were made by; it flatters what was chosen, so it is never the result |
# | NLL, calibration error | how good the predicted probabilities are |
# | saw labels | whether the method used the validation labels |
# | networks x images scored | the cost; searches are compared at the same |
#
# ## The pictures

# %%
import matplotlib.pyplot as plt

for name in ("accuracy", "fitness", "mask"):
    image = plt.imread(f"run/plots/{name}.png")
    height, width = image.shape[:2]
    figure = plt.figure(figsize=(9, 9 * height / width))
    figure.add_axes([0, 0, 1, 1]).imshow(image)
    plt.axis("off")

# %% [markdown]
# - **Accuracy**: every method once, validation open and test filled. Look for test marks far left
#   of their validation mark: there the choice was overfitted.
# - **Fitness**: the best and the spread of the population, with the parents' own level. A curve
#   that still rises at the end asks for more generations; one that starts at its final height says
#   that the first population had it already.
# - **Mask**: how much of each parent every hidden unit took, layer by layer. One colour throughout
#   means that the search went back to a parent.
#
# ## One seed is one seed
#
# The intervals know about the choice of test images, not about the luck of a seed. `megajax run
# --seeds 0:5` repeats everything with five, and its report tests over seeds. `megajax compare RUN
# RUN` puts finished runs side by side.
