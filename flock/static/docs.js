// In its own file, because the Content-Security-Policy forbids inline scripts.
SwaggerUIBundle({ url: "openapi.yaml", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null });
