from .genailab import QuadapterTechnique as QuadapterTechnique
from .olive import Quadapter as Quadapter
from .olive import write_olive_packages as write_olive_packages
