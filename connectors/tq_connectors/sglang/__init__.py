"""SGLang on compressed pages: a plugin with dtypes, the KV pool that holds pages, and attention on them."""
