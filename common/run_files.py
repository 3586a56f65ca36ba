"""Names shared by training, which writes runs, and evaluation, which reads them."""

PUBLISHED = "published"  # the folder below results/ of runs that are committed
RESERVED = (PUBLISHED, "data", "data-synthetic", "overfit_batch", "sanity_checks", "tune")  # other folders there
METRICS = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr", "seconds")
