{{- define "tq-store.name" -}}
{{- $name := .Release.Name -}}
{{- if not (contains .Chart.Name $name) }}{{ $name = printf "%s-%s" $name .Chart.Name }}{{ end -}}
{{- $name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "tq-store.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tq-store.labels" -}}
{{ include "tq-store.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "tq-store.tenantsSecret" -}}
{{- if .Values.tenants.secret }}{{ .Values.tenants.secret }}
{{- else if .Values.tenants.inline }}{{ include "tq-store.name" . }}-tenants
{{- else }}{{ fail "name a Secret with the tenants: --set tenants.secret=NAME (deploy/README.md makes one)" }}
{{- end }}
{{- end }}
