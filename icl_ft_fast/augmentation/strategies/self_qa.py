"""self-qa: questions about a document with their answers, each pair one row."""

from icl_ft_fast.augmentation.strategy import Strategy, questions_and_answers

STRATEGY = Strategy(
    name="self-qa",
    sees="one document",
    writes="questions with their answers",
    labels=("Question", "Answer"),
    read=questions_and_answers,
    examples=("rivers", "brooks", "torvik", "brandt", "mill", "granary", "lumo", "lamp", "osprey"),
    begins=("Question: What", "Question: Which", "Question: Who"),
    begun_stop=("\nQuestion:", "\nDocument:"),
)
