// Beside the page and not in it, so that the content policy can forbid inline scripts.
SwaggerUIBundle({ url: "openapi.yaml", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null });
