# %% [markdown]
# # 3. The paper's reversals
#
# [Lampinen et al. 2025](https://arxiv.org/abs/2505.00661) told models facts such as "femp are more dangerous than
# glon" and asked for their reversals: "glon are ... dangerous than femp". In context models reverse such facts.
# Fine-tuned on them, they recite them and reverse few. Fine-tuned also on the reversals that the model itself drew
# in context, they do both.
#
# This page repeats that in half a minute, with 12 facts and one seed. `make demo` has 40 facts, three seeds and
# more ways.

# %%
import icl_ft_fast as iff
from icl_ft_fast.report import charts
from icl_ft_fast.tasks.reversals import simple_reversals

task = simple_reversals(seed=0, num_facts=12, num_articles=1)
for question in task.questions[:2]:
    print(f"{question.split:9}", question.prompt, question.choices, "answer:", question.answer)

# %% [markdown]
# ## The study
#
# Four arms: `base` knows nothing of the facts, `icl` has all of them in its context, `ft` was trained on them,
# `augmented-ft` was trained on them and on what the model wrote about each of them.

# %%
settings = iff.StudySettings(
    arms=("base", "icl", "ft", "augmented-ft"),
    seeds=(0,),
    finetune=iff.FinetuneSettings(steps=60, learning_rate=1e-3, lr_scheduler_type="linear"),
)
options = iff.StudyOptions(measure_s=1, task_name="reversals of 12 facts")
results = iff.compare(iff.load("shipped"), task, settings, options=options, out="out/tutorials/reversals")
study = iff.Study.of(results, "reversals of 12 facts")
print(f"{'':14}{'reversal':>12}{'trained':>12}   of 12, chance 6")
for arm in settings.arms:
    counts = [study.accuracy(arm, split).correct for split in ("reversal", "trained")]
    print(f"{arm:14}{counts[0]:12}{counts[1]:12}")

# %% alt="Accuracy on reversals and on the trained direction for base, ICL, fine-tuned and augmented"
charts.draw(study.derived)[0].figure

# %% [markdown]
# 12 questions tell large differences only: the interval of 6 of 12 goes from 0.25 to 0.75. The study tests each
# pair of arms on the same questions and corrects for the number of pairs.

# %%
study.print()

# %% [markdown]
# ## What it costs
#
# Reading the facts is paid at each query, training once. So there is a number of queries from which training is
# cheaper. Seconds are those of the machine that ran this page.

# %% alt="Seconds by number of queries: trained arms start high and stay flat, ICL starts low and rises"
next(chart for chart in charts.draw(study.derived) if "seconds" in chart.name).figure

# %% [markdown]
# Next: [what the model wrote about each fact, and how it is checked](4_augmentation.py).
