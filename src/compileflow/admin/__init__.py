"""Operations on stores and registries: collect garbage, mirror, promote, pull, show lineage and differences."""
