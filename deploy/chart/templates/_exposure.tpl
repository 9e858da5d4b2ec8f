{{/* An Ingress. Arguments: root, its values, name of the Service, its port. */}}
{{- define "ladderstitch.ingress" -}}
{{- $root := index . 0 }}
{{- $values := index . 1 }}
{{- $service := index . 2 }}
{{- $port := index . 3 }}
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: {{ $service }}
  labels:
    {{- include "ladderstitch.labels" $root | nindent 4 }}
  {{- with $values.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with $values.className }}
  ingressClassName: {{ . }}
  {{- end }}
  {{- with $values.tls }}
  tls:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- $backend := dict "service" (dict "name" $service "port" (dict "number" (int $port))) }}
  {{- $paths := list (dict "path" "/" "pathType" "Prefix" "backend" $backend) }}
  rules:
    {{- range $values.hosts | default (list "") }}
    - {{ with . }}host: {{ . | quote }}
      {{ end }}http:
        paths:
          {{- toYaml $paths | nindent 10 }}
    {{- end }}
{{- end }}

{{/*
A route of the Gateway API, and the policy that lets its Gateway verify the pods' certificate.
Arguments: root, its values, kind, name of the Service, its port.
*/}}
{{- define "ladderstitch.route" -}}
{{- $root := index . 0 }}
{{- $values := index . 1 }}
{{- $kind := index . 2 }}
{{- $service := index . 3 }}
apiVersion: gateway.networking.k8s.io/v1
kind: {{ $kind }}
metadata:
  name: {{ $service }}
  labels:
    {{- include "ladderstitch.labels" $root | nindent 4 }}
  {{- with $values.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  parentRefs:
    {{- toYaml $values.parentRefs | nindent 4 }}
  {{- with $values.hostnames }}
  hostnames:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  rules:
    - backendRefs:
        - {name: {{ $service }}, port: {{ index . 4 }}}
{{- with $values.caConfigMap }}
---
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata:
  name: {{ $service }}
  labels:
    {{- include "ladderstitch.labels" $root | nindent 4 }}
spec:
  targetRefs:
    - {group: "", kind: Service, name: {{ $service }}}
  validation:
    hostname: {{ $root.Values.tls.serverName }}
    caCertificateRefs:
      - {group: "", kind: ConfigMap, name: {{ . }}}
{{- end }}
{{- end }}
