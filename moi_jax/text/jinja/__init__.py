"""A checkpoint's own chat template in Jinja: rendering, trained spans, comparison with ours."""
