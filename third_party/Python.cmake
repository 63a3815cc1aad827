# The Python that the extensions are built for. scikit-build-core names the component for the stable ABI
# where the wheel may use it (Python >= 3.12).
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module OPTIONAL_COMPONENTS ${SKBUILD_SABI_COMPONENT})
