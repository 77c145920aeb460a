"""What MNIST, CIFAR-10 and CIFAR-100 are: classes, counts, published checksums, makers. Facts only, no torch.

The readers check what they find against these facts, and take them as an argument, so that tests can read small sets.
"""

from dataclasses import dataclass

PARTS = ("train", "test")


@dataclass(frozen=True)
class ImageSet:
    """An image data set with an official test part. Labels are positions in `classes`."""

    name: str  # as in the configuration
    title: str
    torchvision: str  # its class there
    shape: tuple[int, int, int]  # of an image: channels, height, width
    classes: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]  # of each part, by class
    home: str  # folder of the official files in torchvision's layout
    files: dict[str, dict[str, str]]  # of each part: official file -> MD5 of its content, uncompressed
    accepted: str  # official files, in words for a message
    label_key: str  # of the official pickles
    made_by: str
    licence: str

    @property
    def file_names(self) -> list[str]:
        return [file for files in self.files.values() for file in files]

    @property
    def size(self) -> str:
        """Of an image, in words."""
        channels, height, width = self.shape
        return f"{'RGB' if channels == 3 else 'grey'} {width} x {height}"


_TINY = 'A. Krizhevsky, V. Nair, G. Hinton; "Learning Multiple Layers of Features from Tiny Images", 2009'
_TINY_LICENCE = "none stated by its makers, who ask users to cite the report"

MNIST = ImageSet(
    name="mnist",
    title="MNIST",
    torchvision="MNIST",
    shape=(1, 28, 28),
    classes=tuple("0123456789"),
    counts={
        "train": (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
        "test": (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
    },
    home="MNIST/raw",
    files={
        "train": {
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        },
        "test": {
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
    },
    accepted="MNIST/raw/ with the four files *-ubyte or *-ubyte.gz",
    label_key="",
    made_by="Y. LeCun, C. Cortes, C. Burges, from NIST's Special Databases 1 and 3",
    licence="none stated where its makers published it; the documentation of Keras names CC BY-SA 3.0",
)

CIFAR10 = ImageSet(
    name="cifar10",
    title="CIFAR-10",
    torchvision="CIFAR10",
    shape=(3, 32, 32),
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    counts={"train": (5000,) * 10, "test": (1000,) * 10},
    home="cifar-10-batches-py",
    files={
        "train": {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
    },
    accepted="cifar-10-python.tar.gz or cifar-10-batches-py/",
    label_key="labels",
    made_by=_TINY,
    licence=_TINY_LICENCE,
)

_FINE = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
    "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
    "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
    "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)

CIFAR100 = ImageSet(
    name="cifar100",
    title="CIFAR-100",
    torchvision="CIFAR100",
    shape=(3, 32, 32),
    classes=tuple(_FINE.split()),
    counts={"train": (500,) * 100, "test": (100,) * 100},
    home="cifar-100-python",
    files={
        "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
        "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    },
    accepted="cifar-100-python.tar.gz or cifar-100-python/",
    label_key="fine_labels",
    made_by=_TINY,
    licence=_TINY_LICENCE,
)

SETS = {known.name: known for known in (MNIST, CIFAR10, CIFAR100)}
